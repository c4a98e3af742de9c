"""Reading and writing checkpoints: HF folders, orbax folders, retaining heads; tensors are streamed."""
