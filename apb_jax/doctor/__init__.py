"""What is wrong with this machine, and what to do about it: facts, findings, a short self-test."""
