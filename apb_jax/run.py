"""``python -m apb_jax.run``: one command answers a question about a long document.

Devices are decided on before JAX initialises its backends; heavy imports wait until the arguments are known to be good.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apb_jax.command import command
from apb_jax.errors import UserError
from apb_jax.files import to_json
from apb_jax.kv_memory import HOST
from apb_jax.options import DEFAULT_SEQ, RunConfig, parse, split_method

if TYPE_CHECKING:
    from rich.console import Console

    from apb_jax.engine import Engine
    from apb_jax.measure.compare import Asking
    from apb_jax.weights.checkpoint import LoadedModel


def choose_devices(config: RunConfig, console: Console) -> None:
    """Simulated devices where there is no accelerator; the process group where there are several processes."""
    from apb_jax.joining import Joining
    from apb_jax.mesh import has_accelerator, reserve_host_memory, reserve_memory, simulate_devices, simulated_devices

    joining = Joining(config.coordinator, config.processes, config.process)
    simulated = 0
    if has_accelerator():
        reserve_memory()
        if config.kv == HOST:
            reserve_host_memory()
    else:
        simulated = max(1, simulated_devices(config.model, config.sp, config.tp, config.shards) // joining.count)
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
    from apb_jax.presets import TEMPLATES
    from apb_jax.prompt.style import NONE, OWN
    from apb_jax.weights.checkpoint import load

    known = (OWN, *TEMPLATES, NONE)
    if config.template is not None and config.template not in known:
        raise UserError(f"unknown template {config.template!r}; there are: {', '.join(known)}")
    fold = True if config.fold_heads else None  # None: as the folder has them
    model = load(config.model, weights=config.weights, heads=config.heads, dtype=config.dtype, fold_heads=fold)
    if model.source.fp8 and (config.precision == "bf16" or config.weights_dtype == "model"):
        raise UserError(
            f"the matrices of {model.name} are stored in fp8, which is what runs; drop "
            f"{'--precision bf16' if config.precision == 'bf16' else '--weights-dtype model'}"
        )
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
    from apb_jax.measure.host_link import host_note
    from apb_jax.measure.plan import check_memory, spread
    from apb_jax.mesh import SP, make_mesh, sequence_devices
    from apb_jax.profile import profiled
    from apb_jax.run_session import method_options, run_session
    from apb_jax.sampling import Sampler
    from apb_jax.task import make_task, new_tokens

    use_compile_cache()
    others = [(MethodSpec(name), precision) for name, precision in map(split_method, config.compare)]
    sampler = Sampler(config.temperature, config.top_p)
    model = load_model(config)
    sp, name = config.sp, config.method
    if name == "auto":
        name, sp, reason = decide_method(config, model, text)
        console.print(f"note: --method auto: {reason}", style="yellow", highlight=False)
    sp = sp or sequence_devices(max(1, len(jax.devices()) // config.tp), config.shards)
    mesh, method = make_mesh(sp, config.tp), MethodSpec(name, method_options(config))
    held = ", ".join(filter(None, (model.dtype.name, str(config.precisions))))
    size = f"{model.config.parameters / 1e6:,.1f}M parameters, {held}, kernels {config.kernels}"
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    settings = Settings(
        kernels=Kernels(None if config.kernels == "auto" else config.kernels),
        prompt_style=config.prompt_style,
        shards=method.shards_on(mesh.shape[SP], config.shards),
        placement=config.placement,
        kv_memory=config.kv,
        slice_decode=config.slice_decode,
        bottom_right_query=config.bottom_right_query,
        answers_only=config.session is not None,
        precision=config.precisions,
    )
    with screen.StageBar(console) as bar:
        engine = Engine(model, method, mesh, settings=settings, progress=bar)
        held = ", ".join(filter(None, (model.dtype.name, str(engine.settings.precision))))
        size = f"{model.config.parameters / 1e6:,.1f}M parameters, {held}, kernels {config.kernels}"
        described = f"{size}, {device}, template {engine.template}"
        console.print(f"[bold]apb_jax[/] {config.model}: {described}", highlight=False)
        if config.session is not None or config.save_session is not None:
            return run_session(config, text, engine, console)
        task = make_task(config, text, engine)
    wanted = new_tokens(config, task.prompt, model.config.max_positions)
    make = Beside(engine)
    engines = [engine, *(make.of(spec, at) for spec, at in others)]  # refuses what cannot run before anything runs
    engines = [spread(current, [task.prompt], wanted, config.gpu_memory) for current in engines]
    engine = engines[0]
    check_precisions(config, engines)
    for current in engines:
        current.choose([task.prompt])
        current.check_lengths([task.prompt], [task.prompt.query], wanted)
        check_memory(current, [task.prompt], wanted, config.gpu_memory, beside=engines)
    notes = [*name_notes(config), *task.notes, *filter(None, [host_note(engine, [task.prompt])])]
    notes += [note for note in (engine.codec and engine.codec.note, model.config.window_note) if note]
    repeat = int(bool(others)) if config.repeat is None else config.repeat
    asking = Asking(
        task.prompt, wanted, sampler, config.seed, () if engine.codec is None else None, task.truth,
        repeat=repeat, alone=not others, mass=config.mass,
    )  # fmt: skip
    with profiled(config.profile) as failed:
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
                    bar.restart(report.label(current.method.name, current.settings.precision, engine))
                    if current is not engine:
                        show_method(console, current, asking, [])

                result = beside(engines, asking, first, starting)
        else:
            timed(engine, asking, first[0])
            result = first[0]
    result |= {"model": config.model, "weights": config.weights or "checkpoint", "seed": config.seed}
    if failed:
        result["profile_error"] = failed[0]
    show_result(console, result)
    return result


def check_precisions(config: RunConfig, engines: Sequence[Engine]) -> None:
    """Refuse a comparison with another precision where the files decide it: FP8 weights stay so."""
    own, *others = engines
    for text, other in zip(config.compare, others, strict=True):
        asked = split_method(text)[1]
        if asked is not None and asked != other.settings.precision:
            raise UserError(
                f"--compare {text}: the matrices of {own.model.name} are stored in fp8, which is what runs; "
                f"nearest legal choice: --compare {text.partition('@')[0]}@fp8"
            )


def name_notes(config: RunConfig) -> list[str]:
    """What a model's name may hide: a folder of the same name, and what the packaged model was made for."""
    from apb_jax.presets import MODELS

    notes = []
    if (config.model in MODELS or config.model == "tiny") and Path(config.model).exists():
        notes.append(f"--model {config.model} is the preset; for the folder of that name here give ./{config.model}")
    if config.model == "tiny" and config.weights is None and config.document is not None:
        notes.append(
            "the packaged model only retrieves what a text says in so many words (numbers, pass keys, values); about "
            "prose it invents: try --model smollm2-135m or larger"
        )
    return notes


def show_method(console: Console, engine: Engine, asking: Asking, notes: list[str]) -> None:
    """What the user should know before the method runs, and its layout as a picture."""
    from rich.text import Text

    from apb_jax import screen

    method, why = engine.choose([asking.prompt])
    for note in (*notes, *why):
        console.print(Text(f"note: {note}", style="yellow"))
    layout = method.layout([asking.prompt], engine.shards)
    plain = not (console.encoding or "").lower().startswith("utf")
    console.print(screen.layout_picture(layout, method, dict(engine.mesh.shape), plain=plain))


def decide_method(config: RunConfig, model: LoadedModel, text: str | None) -> tuple[str, int, str]:
    """(method, devices, reason) for this document by what ``apb_jax.calibrate`` measured on this machine."""
    import jax

    from apb_jax.measure.choose import choose

    devices = config.sp or len(jax.devices()) // config.tp
    length = DEFAULT_SEQ if config.seq is None else config.seq
    if text is not None and model.tokenizer is not None:
        whole = len(model.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        length = whole if config.seq is None else min(whole, config.seq)
    found = choose(
        model, length, devices,
        tp=config.tp, limit=config.gpu_memory, precision=config.precisions, kv_memory=config.kv,
    )  # fmt: skip
    return found.method, found.devices, found.reason


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The closing table, the receipts, the prediction, and the truth where there is one."""
    from apb_jax import report, screen

    header, rows = report.closing_table(result)
    console.print()
    console.print(screen.result_table(rows, header))
    took = ", ".join(f"{op} {' and '.join(names)}" for op, names in result["implementations"].items())
    console.print(f"kernels: {took}", style="dim", highlight=False)
    for line in report.receipts(result):
        console.print(f"\n{line}", highlight=False, markup=False, emoji=False)
    console.print()
    if result["ground_truth"] is not None:
        console.print(f"Ground Truth: {result['ground_truth']}", highlight=False, markup=False, emoji=False)
    screen.write(console, f"Prediction: {result['prediction']}\n")


@command("python -m apb_jax.run", at_once=True)
def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    from rich.console import Console

    config = parse(argv)
    # With --json the JSON line is the last one of standard output, and people read standard error.
    console = Console(stderr=config.json, soft_wrap=True)
    result = run(config, console)
    if console.quiet:
        return
    if config.json:
        print(to_json(result), flush=True)
    if config.save:
        from apb_jax import report

        report.save(Path(config.save), result)
        console.print(f"saved: {config.save}/run.json and run.md", highlight=False, markup=False, emoji=False)
    if "profile_error" in result:
        raise UserError(f"--profile {config.profile}: the trace could not be written: {result['profile_error']}")


if __name__ == "__main__":
    sys.exit(main())
