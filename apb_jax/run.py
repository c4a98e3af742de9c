"""``python -m apb_jax.run``: one command answers a question about a long document.

Devices are decided on before JAX initialises its backends; heavy imports wait until the arguments are known to be good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apb_jax.errors import UserError
from apb_jax.options import DEFAULT_SEQ, DEFAULT_SIMULATED, RunConfig, parse

if TYPE_CHECKING:
    from rich.console import Console

    from apb_jax.engine import Engine
    from apb_jax.measure.compare import Asking
    from apb_jax.weights.checkpoint import LoadedModel


def choose_devices(config: RunConfig, console: Console) -> None:
    """Simulated devices where there is no accelerator; the process group where there are several processes."""
    from apb_jax.mesh import Joining, has_accelerator, reserve_memory, sequence_devices, simulate_devices

    joining = Joining(config.coordinator, config.processes, config.process)
    simulated = 0
    if has_accelerator():
        reserve_memory()
    else:
        # The packaged model shows eight shards on as many devices; any other answers faster on one (its shards stay).
        usual = DEFAULT_SIMULATED if config.model == "tiny" else 1
        simulated = max(1, (config.sp or sequence_devices(usual, config.shards)) * config.tp // joining.count)
        simulate_devices(simulated)
    joining.start()
    if joining.count > 1:
        import jax

        console.quiet = jax.process_index() > 0  # only the first of several processes speaks
    if simulated:
        devices = "1 CPU device" if simulated == 1 else f"{simulated} simulated CPU devices"
        console.print(f"no GPU here: {devices} on this machine's cores", style="dim")


def load_model(config: RunConfig) -> LoadedModel:
    """The model of the command line, under YaRN or STRING where asked for; no weights are read yet."""
    from apb_jax.model.config import with_string, with_yarn
    from apb_jax.weights.checkpoint import load

    fold = True if config.fold_heads else None  # None: as the folder has them
    model = load(config.model, weights=config.weights, heads=config.heads, dtype=config.dtype, fold_heads=fold)
    if config.yarn_factor is not None:
        return dataclasses.replace(model, config=with_yarn(model.config, config.yarn_factor))
    if config.rope != "string":
        return model
    length = config.seq or model.config.max_positions
    changed = with_string(model.config, config.string_offset, config.string_local, length)
    return dataclasses.replace(model, config=changed)


def run(config: RunConfig, console: Console) -> dict[str, Any]:
    """Do what the configuration asks for, telling ``console``; returns the JSON object."""
    text = config.read_document() if config.document is not None else None
    choose_devices(config, console)
    import jax

    from apb_jax import report, screen
    from apb_jax.attention.inputs import Kernels
    from apb_jax.attention.registry import MethodSpec
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.engine import Engine, Settings
    from apb_jax.measure.beside import Beside
    from apb_jax.measure.compare import Asking, beside, run_one, timed
    from apb_jax.measure.plan import check_memory
    from apb_jax.mesh import SP, make_mesh, sequence_devices
    from apb_jax.run_session import method_options, run_session
    from apb_jax.sampling import Sampler
    from apb_jax.task import make_task, new_tokens

    use_compile_cache()
    others = [MethodSpec(name) for name in config.compare]
    sampler = Sampler(config.temperature, config.top_p)
    model = load_model(config)
    sp, name = config.sp, config.method
    if name == "auto":
        name, sp, reason = decide_method(config, model, text)
        console.print(f"note: --method auto: {reason}", style="yellow", highlight=False)
    sp = sp or sequence_devices(max(1, len(jax.devices()) // config.tp), config.shards)
    mesh, method = make_mesh(sp, config.tp), MethodSpec(name, method_options(config))
    size = f"{model.config.parameters / 1e6:,.1f}M parameters, {model.dtype.name}, kernels {config.kernels}"
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    settings = Settings(
        kernels=Kernels(None if config.kernels == "auto" else config.kernels),
        prompt_style=config.prompt_style,
        shards=method.shards_on(mesh.shape[SP], config.shards),
        placement=config.placement,
        slice_decode=config.slice_decode,
        bottom_right_query=config.bottom_right_query,
        answers_only=config.session is not None,
    )
    with screen.StageBar(console) as bar:
        engine = Engine(model, method, mesh, settings=settings, progress=bar)
        described = f"{size}, {device}, template {engine.template}"
        console.print(f"[bold]apb_jax[/] {config.model}: {described}", highlight=False)
        if config.session is not None or config.save_session is not None:
            return run_session(config, text, engine, console)
        task = make_task(config, text, engine)
    wanted = new_tokens(config, task.prompt, model.config.max_positions)
    engines = [engine, *map(Beside(engine).of, others)]  # refuses what cannot run before anything runs
    for current in engines:
        current.choose([task.prompt])
        current.check_lengths([task.prompt], [task.prompt.query], wanted)
        check_memory(current, [task.prompt], wanted, config.gpu_memory)
    notes = list(task.notes)
    notes += [note for note in (engine.codec and engine.codec.note, model.config.window_note) if note]
    repeat = int(bool(others)) if config.repeat is None else config.repeat
    asking = Asking(
        task.prompt, wanted, sampler, config.seed, () if engine.codec is None else None, task.truth,
        repeat=repeat, alone=not others, mass=config.mass,
    )  # fmt: skip
    with jax.profiler.trace(config.profile) if config.profile else contextlib.nullcontext():
        show_method(console, engine, asking, notes)
        with screen.StageBar(console) as bar:
            engine.listen(bar)
            stream = screen.AnswerStream(console, engine, bar)
            first = run_one(engine, asking, stream)
        stream.end(first[1].finish_reason)
        if others:
            with screen.StageBar(console) as bar:
                for current in engines:
                    current.listen(bar)

                def starting(current: Engine) -> None:
                    bar.restart(current.method.name)
                    if current is not engine:
                        show_method(console, current, asking, [])

                result = beside(engines, asking, first, starting)
        else:
            timed(engine, asking, first[0])
            result = first[0]
    result |= {"model": config.model, "weights": config.weights or "checkpoint", "seed": config.seed}
    show_result(console, result)
    if config.save and not console.quiet:
        report.save(Path(config.save), result)
        console.print(f"saved: {config.save}/run.json and run.md", highlight=False, markup=False, emoji=False)
    return result


def show_method(console: Console, engine: Engine, asking: Asking, notes: list[str]) -> None:
    """What the user should know before the method runs, and its layout as a picture."""
    from apb_jax import screen

    method, why = engine.choose([asking.prompt])
    for note in (*notes, *why):
        console.print(f"note: {note}", style="yellow", highlight=False)
    layout = method.layout([asking.prompt], engine.shards)
    console.print(screen.layout_picture(layout, method, dict(engine.mesh.shape)))


def decide_method(config: RunConfig, model: LoadedModel, text: str | None) -> tuple[str, int, str]:
    """(method, devices, reason) for this document by what ``apb_jax.calibrate`` measured on this machine."""
    import jax

    from apb_jax.measure.choose import choose

    devices = config.sp or len(jax.devices()) // config.tp
    length = DEFAULT_SEQ if config.seq is None else config.seq
    if text is not None and model.tokenizer is not None:
        whole = len(model.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        length = whole if config.seq is None else min(whole, config.seq)
    found = choose(model, length, devices, tp=config.tp, limit=config.gpu_memory)
    return found.method, found.devices, found.reason


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The closing table, the receipts, the prediction, and the truth where there is one."""
    from apb_jax import report, screen

    header, rows = report.closing_table(result)
    console.print()
    console.print(screen.result_table(rows, header))
    for line in report.receipts(result):
        console.print(f"\n{line}", highlight=False)
    console.print()
    if result["ground_truth"] is not None:
        console.print(f"Ground Truth: {result['ground_truth']}", highlight=False, markup=False)
    screen.write(console, f"Prediction: {result['prediction']}\n")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error for wrong input and for Ctrl-C."""
    from rich.console import Console

    from pallas_kernels.errors import KernelInputError, Unsupported

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        config = parse(argv)
        # With --json the JSON line is the last one of standard output, and people read standard error.
        console = Console(stderr=config.json, soft_wrap=True)
        result = run(config, console)
        if config.json and not console.quiet:
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
