"""Evidence on a real model: samples prepared with a tokenizer, run on a device without one, scored afterwards."""
