"""``python -m apb_jax.run``: one command answers a question about a long document.

Devices are decided on before JAX initialises its backends; heavy imports wait until the arguments are known to be good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apb_jax.errors import UserError
from apb_jax.options import DEFAULT_SEQ, DEFAULT_SIMULATED, RunConfig, parse

if TYPE_CHECKING:
    from rich.console import Console

    from apb_jax.attention import Prompt
    from apb_jax.engine import Answer, Engine, Session
    from apb_jax.measure.receipt import Receipt
    from apb_jax.weights.checkpoint import LoadedModel

RANDOM_QUERY_TOKENS = 32
DEFAULT_NEW_TOKENS = 32


def choose_devices(config: RunConfig, console: Console) -> None:
    """Simulated devices where there is no accelerator; the process group where there are several processes."""
    from apb_jax.mesh import has_accelerator, simulate_devices, start_distributed

    if not has_accelerator():
        count = sequence_devices(config, DEFAULT_SIMULATED) * config.tp // (config.processes or 1)
        simulate_devices(max(1, count))
        console.print(f"no GPU here: {count} simulated CPU devices on this machine's cores", style="dim")
    start_distributed(config.coordinator, config.processes, config.process)


def sequence_devices(config: RunConfig, default: int) -> int:
    """Devices on the sequence axis where the machine itself does not decide."""
    return config.sp or (1 if config.virtual_shards > 1 else default)


def versions() -> dict[str, str]:
    """Of what decides numbers and speed."""
    import flax
    import jax
    import jaxlib
    import numpy

    from apb_jax import __version__

    return {
        "apb_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def peak_bytes(engine: Engine) -> tuple[int, str]:
    """Peak bytes on the fullest device, and where the number comes from."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "measured peak"
    return engine.programs.peak_bytes(), "compiler's estimate"


def make_task(
    config: RunConfig, text: str | None, model: LoadedModel, engine: Engine
) -> tuple[Prompt, str | None, list[str]]:
    """(prompt, ground truth or None, notes): from the user's file, a needle, or random ids."""
    import numpy as np

    new_tokens = config.max_new_tokens or DEFAULT_NEW_TOKENS
    if text is not None:
        if engine.codec is None:
            raise UserError(f"--document is text, and model {config.model!r} has no tokenizer; give a folder with one")
        prompt = engine.prompt(text, str(config.query))
        document, notes = prompt.document, []
        room = len(document) if config.seq is None else config.seq - len(prompt.query) - new_tokens
        if room < 1:
            raise UserError(f"--seq {config.seq} leaves no room for a document beside query and answer")
        if len(document) > room:
            half = room // 2
            kept = np.concatenate([document[: room - half], document[len(document) - half :]])
            notes.append(f"--seq {config.seq}: kept start and end of {len(document):,} document tokens, {room:,}")
            prompt = dataclasses.replace(prompt, document=kept)
        return prompt, None, notes
    positions = model.config.max_positions
    seq = config.seq or min(DEFAULT_SEQ, positions)
    if seq > positions:
        raise UserError(
            f"--seq {seq} exceeds the {positions} positions of {model.name}; nearest legal choice: {positions}"
        )
    rng = np.random.default_rng(config.seed)
    if engine.codec is None:
        if config.needle is not None:
            raise UserError(
                f"--needle needs a tokenizer, and model {config.model!r} with --weights {config.weights} has none"
            )
        rows = seq - RANDOM_QUERY_TOKENS - new_tokens
        if rows < 1:
            raise UserError(f"--seq {seq} leaves no room for a document beside {seq - rows} query and answer tokens")
        document, query = (rng.integers(0, model.config.vocab_size, n) for n in (rows, RANDOM_QUERY_TOKENS))
        return engine.prompt(document, query), None, ["no tokenizer: a document of random token ids"]
    from apb_jax.synthetic.needle import needle_prompt

    digits = config.needle or "".join(map(str, rng.integers(0, 10, 10)))
    query_room = 64
    task = needle_prompt(model.tokenizer, seq - new_tokens - query_room, digits, config.depth, config.seed)
    return engine.prompt(task.document, task.query), task.answer, []


def first_number(text: str) -> str | None:
    """The first run of digits: what a needle's answer is judged by."""
    found = re.search(r"\d+", text)
    return found[0] if found else None


def describe(config: RunConfig, engine: Engine, session: Session, answer: Answer, truth: str | None) -> dict[str, Any]:
    """The JSON object of one method's run."""
    import jax

    peak, source = peak_bytes(engine)
    device = jax.devices()[0]
    return {
        "prediction": answer.text.strip() or " ".join(map(str, answer.tokens)),
        "ground_truth": truth,
        "correct": None if truth is None else first_number(answer.text) == truth,
        "method": answer.method.name,
        "method_options": dataclasses.asdict(answer.method),
        "layers": engine.model.config.num_layers,
        "dense_layers": list(answer.method.dense_layers_of(engine.model.config)),
        "model": config.model,
        "weights": config.weights or "checkpoint",
        "dtype": engine.model.dtype.name,
        "kernels": config.kernels,
        "slice_decode": config.slice_decode,
        "template": engine.template,
        "mesh": dict(engine.mesh.shape),
        "shards": engine.shards,
        "device": f"{device.device_kind} ({device.platform})",
        "document_tokens": answer.document_tokens,
        "query_tokens": answer.query_tokens,
        "new_tokens": len(answer.tokens),
        "tokens": answer.tokens,
        "prefill_s": answer.prefill_s,
        "prefill_tokens_per_s": answer.prefill_tokens_per_s,
        "query_s": answer.query_s,
        "decode_s": answer.decode_s,
        "decode_ms_per_token": answer.decode_ms_per_token,
        "compile_s": answer.compile_s,
        "peak_bytes_per_device": peak,
        "memory_source": source,
        "notes": list(answer.notes),
        "seed": config.seed,
        "versions": versions(),
    }


def run(config: RunConfig, console: Console) -> dict[str, Any]:
    """Do what the configuration asks for, telling ``console``; returns the JSON object."""
    text = config.read_document() if config.document is not None else None
    choose_devices(config, console)
    import jax

    from apb_jax import screen
    from apb_jax.attention import Kernels, MethodSpec
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.engine import Engine
    from apb_jax.measure.beside import Beside
    from apb_jax.measure.traffic import layer_traffic
    from apb_jax.mesh import make_mesh
    from apb_jax.rope.string import with_string
    from apb_jax.sampling import Sampler
    from apb_jax.weights.checkpoint import load

    use_compile_cache()
    others = [MethodSpec(name) for name in config.compare]
    sampler = Sampler(config.temperature, config.top_p)
    fold = True if config.fold_heads else None  # None: as the folder has them
    model = load(config.model, weights=config.weights, heads=config.heads, dtype=config.dtype, fold_heads=fold)
    if config.rope == "string":
        length = config.seq or model.config.max_positions
        model = dataclasses.replace(
            model, config=with_string(model.config, config.string_offset, config.string_local, length)
        )
    sp = 1 if config.virtual_shards > 1 else config.sp
    name = config.method
    if name == "auto":
        name, sp, reason = decide_method(config, model)
        console.print(f"note: --method auto: {reason}", style="yellow", highlight=False)
    method = MethodSpec(name, config.method_options)
    mesh = make_mesh(sp, config.tp)
    size = f"{model.config.parameters / 1e6:,.1f}M parameters, {model.dtype.name}, kernels {config.kernels}"
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    console.print(f"[bold]apb_jax[/] {config.model}: {size}, {device}", highlight=False)
    with screen.StageBar(console) as bar:
        engine = Engine(
            model,
            method,
            mesh,
            kernels=Kernels(None if config.kernels == "auto" else config.kernels),
            template=config.template,
            bottom_right_query=config.bottom_right_query,
            virtual_shards=config.virtual_shards,
            slice_decode=config.slice_decode,
            progress=bar,
        )
        prompt, truth, notes = make_task(config, text, model, engine)
    engines = [engine, *map(Beside(engine).of, others)]  # refuses what cannot run before anything runs
    for current in engines:
        current.choose([prompt])
    if engine.shards == 1 and not engine.can.exact and engine.can.max_shards != 1:
        notes.append(f"one shard: {name} is plain full attention; --virtual-shards 8 splits the document on one device")
    new_tokens = config.max_new_tokens or DEFAULT_NEW_TOKENS
    stop_ids: tuple[int, ...] | None = () if engine.codec is None else None
    results, sessions, answers = [], [], []
    trace = jax.profiler.trace(config.profile) if config.profile else contextlib.nullcontext()
    with trace:
        for current in engines:
            chosen, why = current.choose([prompt])
            for note in (*notes, *why):
                console.print(f"note: {note}", style="yellow", highlight=False)
            notes = []
            picture = screen.layout_picture(chosen.layout([prompt], current.shards), chosen, dict(current.mesh.shape))
            console.print(picture)
            with screen.StageBar(console) as bar:
                current.listen(bar)
                session = current.prefill([prompt])
            stream = AnswerStream(console, current)
            (answer,) = session.generate(
                new_tokens, sampler=sampler, seed=config.seed, stop_ids=stop_ids, on_tokens=stream
            )
            stream.end()
            sessions.append(session)
            answers.append(answer)
            results.append(describe(config, current, session, answer, truth))
            if others:
                moved = layer_traffic(current, answer.method, [prompt])
                results[-1] |= {"collectives_per_layer": moved.collectives, "bytes_per_layer": moved.received_bytes}
    result = results[0]
    if others:
        for session, one in zip(sessions, results, strict=True):  # last: its memory is not the methods'
            mass = session.recovered_mass()
            one["recovered_mass"] = mass.to_json() if mass else None
        result["compare"] = [
            other
            | {
                "receipt": make_receipt(sessions[0], sessions[i], answers[0], answers[i]).to_json(),
                "speedup": other["prefill_s"] / result["prefill_s"],
            }
            for i, other in enumerate(results[1:], 1)
        ]
    show_result(console, result)
    if config.save and not config.process:
        save_result(Path(config.save), result)
        console.print(f"saved: {config.save}/run.json and run.md", highlight=False, markup=False)
    return result


def decide_method(config: RunConfig, model: LoadedModel) -> tuple[str, int, str]:
    """(method, devices, reason) by what ``apb_jax.calibrate`` measured on this machine."""
    import jax

    from apb_jax.measure.auto import calibration_path, decide, read_calibration

    calibration = read_calibration(calibration_path(model.config, model.dtype.name), config.model)
    devices = config.sp or len(jax.devices()) // config.tp
    found = decide(config.seq or DEFAULT_SEQ, devices, model.config, calibration)
    return found.method, found.devices, found.reason


class AnswerStream:
    """Prints an answer as its tokens arrive."""

    def __init__(self, console: Console, engine: Engine) -> None:
        self.console, self.engine = console, engine
        self.ids: list[int] = []
        self.shown = ""
        engine.listen(None)
        console.print("[bold green]answer[/] ", end="")

    def __call__(self, request: int, fresh: list[int]) -> None:
        self.ids.extend(fresh)
        codec = self.engine.codec
        text = codec.decode(self.ids) if codec else " ".join(map(str, self.ids))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: wait for the rest
            self.console.print(text[len(self.shown) :], end="", markup=False, highlight=False)
            self.shown = text

    def end(self) -> None:
        self.console.print()


def make_receipt(ours: Session, theirs: Session, answer: Answer, reference: Answer) -> Receipt:
    """The first method against the second one, over query and the second one's answer."""
    from apb_jax.measure.receipt import receipt

    given = [reference.tokens]
    return receipt(ours.logits(given)[0], theirs.logits(given)[0], answer.tokens, reference.tokens)


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The closing table, the receipts, and the two lines that matter."""
    from apb_jax import screen

    header, rows = screen.closing_table(result)
    console.print()
    console.print(screen.result_table(rows, header))
    for line in screen.receipts(result):
        console.print(f"\n{line}", highlight=False)
    truth = result["ground_truth"]
    console.print(f"\nGround Truth: {'none (not a needle)' if truth is None else truth}", highlight=False, markup=False)
    console.print(f"Prediction: {result['prediction']}", highlight=False, markup=False)


def save_result(folder: Path, result: dict[str, Any]) -> None:
    """``run.json`` and ``run.md``: what the screen shows, to keep and to compare."""
    from apb_jax import screen

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "run.md").write_text(screen.markdown(result), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--save {folder} cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error for wrong input and for Ctrl-C."""
    from rich.console import Console

    from pallas_kernels.errors import KernelInputError, Unsupported

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        config = parse(argv)
        # With --json the JSON line is the last one of standard output, and people read standard error.
        console = Console(stderr=config.json, soft_wrap=True)
        with quiet_unless_first(config, console):
            result = run(config, console)
        if config.json and not config.process:
            print(json.dumps(result), flush=True)
        return 0
    except UserError as error:
        return fail(str(error))
    except (KernelInputError, Unsupported) as error:
        return fail(f"--kernels: {error}; nearest legal choice: --kernels auto")
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail(
            "the devices ran out of memory; use more of them (--sp, --tp), a shorter --seq, or --dtype bf16: "
            + " ".join(str(error).split())[:160]
        )
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def quiet_unless_first(config: RunConfig, console: Console) -> Any:
    """Only process 0 of several prints."""
    console.quiet = bool(config.process)
    yield


def interrupted(signum: int, frame: object) -> None:
    """Ctrl-C. Ends the process here: a KeyboardInterrupt raised inside a callback of XLA would be lost."""
    from rich.console import Console

    Console().show_cursor()
    os._exit(fail("interrupted"))


def fail(message: str) -> int:
    """One line, status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
