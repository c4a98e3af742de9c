"""The same attention cases in PyTorch: SDPA (cuDNN, FlashAttention) and FlexAttention; JSON lines beside ours."""

import datetime
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from apb_jax.command import Parser, command

HEADS, KV_HEADS, DIM = 32, 8, 128


def median_ms(run, repeats: int = 20) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def normal(length: int, heads: int) -> torch.Tensor:
    return torch.randn(1, heads, length, DIM, device="cuda", dtype=torch.bfloat16)


@command("python benchmarks/peers_torch.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out")
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    def row(case: str, name: str, ms: float, flop: float) -> None:
        rate = flop / ms / 1e9
        print(f"{'flash_attention':18} {case:24} {name:22} {ms:9.4f} ms {rate:8.1f} TFLOP/s", flush=True)
        entry = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "command": "python -m benchmarks.kernels --peers",
            "op": "flash_attention",
            "case": case,
            "implementation": name,
            "ms": ms,
            "rate": rate,
            "unit": "TFLOP/s",
        }
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(entry) + "\n")

    for length in (16384, 32768):
        q, k, v = normal(length, HEADS), normal(length, KV_HEADS), normal(length, KV_HEADS)
        flop = 2.0 * HEADS * DIM * length**2
        for name, backend in (
            ("torch SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("torch SDPA flash", SDPBackend.FLASH_ATTENTION),
        ):
            with sdpa_kernel(backend):
                ms = median_ms(
                    lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    )
                )
            row(f"causal {length // 1024}K", name, ms, flop)

    compiled = torch.compile(flex_attention, dynamic=False)
    anchor, block, slots = 4096, 16384, 7 * 2048
    for shard in (7, 3):
        passed = shard * 2048

        def mask(b, h, i, j, passed=passed):
            in_anchor = i < anchor
            causal = j <= i + slots
            first = torch.where(in_anchor, slots, slots - passed)
            return causal & (j >= first)

        q, k, v = (
            normal(anchor + block, HEADS),
            normal(slots + anchor + block, KV_HEADS),
            normal(slots + anchor + block, KV_HEADS),
        )
        blocks = create_block_mask(mask, 1, 1, anchor + block, slots + anchor + block, device="cuda")
        ms = median_ms(lambda q=q, k=k, v=v, b=blocks: compiled(q, k, v, block_mask=b, enable_gqa=True))
        flop = 4.0 * HEADS * DIM * (anchor**2 / 2 + block * (anchor + passed) + block**2 / 2)
        row(f"APB shard {shard} of 8", "torch FlexAttention", ms, flop)


if __name__ == "__main__":
    sys.exit(main())
