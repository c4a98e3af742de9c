"""From options to the parts of a server: devices, model, method, engine, store."""

from __future__ import annotations

from apb_jax.attention.registry import MethodSpec
from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.options import RunConfig
from apb_jax.serve.options import DEFAULT, ServeConfig
from apb_jax.serve.requests import Defaults
from apb_jax.serve.service import Plan
from apb_jax.serve.store import DeviceStore, SessionStore
from apb_jax.serve.worker import Limits
from apb_jax.weights.checkpoint import LoadedModel

CPU_BYTES = 2 << 30
FREE_SHARE = 0.4
"""Of the free device memory for sessions; the rest is for a prefill's own rows, tails and programs."""


def choose_devices(config: ServeConfig) -> None:
    """One simulated device where there is no accelerator, unless more are asked for."""
    from apb_jax.mesh import has_accelerator, simulate_devices

    if not has_accelerator():
        simulate_devices((config.run.sp or 1) * config.run.tp)


def plan(config: ServeConfig) -> Plan:
    """How to make the parts; nothing is loaded yet."""
    return Plan(
        lambda: make_engine(config),
        lambda engine: make_store(engine, config.device_bytes),
        Limits(config.queue, config.answers),
        Defaults(config.max_new_tokens, config.temperature),
    )


def make_engine(config: ServeConfig) -> Engine:
    """The engine of the command line, its weights on the devices."""
    from apb_jax.attention.inputs import Kernels
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.mesh import SP, make_mesh
    from apb_jax.run import load_model

    run = config.run
    use_compile_cache()
    model = load_model(run)
    if model.tokenizer is None:
        raise UserError(f"{run.model} has no tokenizer; a server needs one")
    mesh = make_mesh(run.sp, run.tp)
    method = choose_method(run, model, mesh.shape[SP])
    engine = Engine(
        model,
        method,
        mesh,
        kernels=Kernels(None if run.kernels == "auto" else run.kernels),
        prompt_style=run.prompt_style,
        shards=method.shards_on(mesh.shape[SP], run.shards),
        placement=run.placement,
        slice_decode=run.slice_decode,
        precision=run.precisions,
    )
    _ = engine.state  # the weights are read now, not by the first request
    return engine


def choose_method(run: RunConfig, model: LoadedModel, devices: int) -> MethodSpec:
    """The method, refused where its prefill reads the question: a session serves questions that come later."""
    exact = "full" if (run.shards or devices) == 1 else "ring"
    options = run.method_options
    if run.method == DEFAULT:
        return MethodSpec(exact, options)
    spec = MethodSpec(run.method, options)
    if run.method == "apb" and options.get("embed_query") is False:
        if options.get("scorer") == "query" or model.retaining_hidden is None:
            raise UserError(
                f"--method apb without the question ranks keys by retaining heads, and {model.name} has none in use; "
                f"give --heads FILE, or the nearest legal choice: --method {exact}"
            )
    elif spec.can.needs_query_in_prefill:
        advice = "--set embed_query=false with retaining heads" if run.method == "apb" else f"--method {exact}"
        raise UserError(
            f"--method {run.method} reads the question while it prefills, and a session serves questions that come "
            f"later; nearest legal choice: {advice}"
        )
    return spec


def make_store(engine: Engine, limit: int | None) -> SessionStore:
    """Sessions in device memory, within ``limit`` bytes or a share of what is free."""
    if limit is None:
        stats = [device.memory_stats() for device in engine.mesh.devices.flat]
        free = sum(one["bytes_limit"] - one["bytes_in_use"] for one in stats if one)
        limit = int(FREE_SHARE * free) if all(stats) else CPU_BYTES
    return DeviceStore(limit)
