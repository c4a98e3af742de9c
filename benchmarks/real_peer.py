"""transformers' own reading of a GGUF file with PyTorch, in float32: what parity and answers are held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """The model of ``file`` in transformers, on the CPU."""

    def __init__(self, file: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        self.torch: Any = torch
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=self.model)["tensors"]
        self.model.load_state_dict(tensors, strict=False)
        self.model.tie_weights()

    def logits(self, ids: Sequence[int], last: int = 0) -> np.ndarray:
        """Float32 [tokens, V] after every token, or after the ``last`` ones alone."""
        with self.torch.no_grad():
            return self.model(self.torch.tensor([list(ids)]), logits_to_keep=last).logits[0].numpy()

    def greedy(self, ids: Sequence[int], new_tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
        """What ``generate`` answers greedily: the new ids without the one that ends them."""
        given = self.torch.tensor([list(ids)])
        self.model.generation_config.eos_token_id = list(stop_ids) or None
        out = self.model.generate(
            given,
            attention_mask=self.torch.ones_like(given),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        new = out[0, len(ids) :].tolist()
        return new[:-1] if new and new[-1] in stop_ids else new
