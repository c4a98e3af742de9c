"""Sessions on disk: a restarted server answers from them, in both limits, and refuses what does not load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve.books import ask, book, until

import apb_jax
from apb_jax.errors import UserError
from apb_jax.serve.background import Background
from apb_jax.serve.disk_store import DiskStore
from apb_jax.serve.requests import Defaults
from apb_jax.serve.service import Plan
from apb_jax.serve.store import DeviceStore
from apb_jax.session_store import read_manifest

Start = Callable[..., tuple[Background, httpx.Client]]


@pytest.fixture
def start(engine: apb_jax.Engine, tmp_path: Path) -> Iterator[Start]:
    """Servers one after the other over one folder of sessions."""
    open_now: list[Any] = []

    def stop() -> None:
        while open_now:
            open_now.pop().close()

    def make(device: int = 1 << 28, disk: int = 1 << 30, memory: int | None = None, method: str = "full") -> Any:
        stop()
        own = engine if method == "full" else engine.with_method(method)
        store = lambda made: DiskStore(made, DeviceStore(device), tmp_path / "sessions", disk)  # noqa: E731
        server = Background(Plan(lambda: own, store, defaults=Defaults(new_tokens=4), memory_bytes=memory))
        http = httpx.Client(base_url=server.url, timeout=60, trust_env=False)
        open_now.extend([server, http])
        return server, http

    yield make
    stop()


def asked(http: httpx.Client, text: str, **more: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": ask(text, "Who saw the river?"), **more})


def places(server: Background) -> list[str]:
    return [one.where for one in server.service.loaded.store.list()]


def written(server: Background, count: int) -> None:
    until(lambda: places(server).count("disk") == count)


def test_a_restarted_server_answers_from_disk(start: Start, tmp_path: Path) -> None:
    server, http = start()
    made = http.post("/v1/documents", json={"text": book(200), "name": "harbour.txt"}).json()
    before = asked(http, book(200)).json()
    written(server, 1)
    (folder,) = tmp_path.glob("sessions/*.session")
    assert read_manifest(folder).versions["apb_jax"] == apb_jax.__version__

    server, http = start()
    (told,) = http.get("/v1/documents").json()["data"]
    assert (told["id"], told["name"], told["status"], told["where"]) == (made["id"], "harbour.txt", "ready", "disk")
    after = asked(http, book(200)).json()
    assert after["choices"] == before["choices"]
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == told["tokens"]
    assert server.metric("prefills_total") == 0
    assert server.metric("session_lookups_total", result="disk") == 1
    told = http.get(f"/v1/documents/{made['id']}").json()
    assert told["where"] == "device"
    assert "loaded from session" in " ".join(told["notes"])
    assert str(tmp_path) not in " ".join(told["notes"])
    assert server.metric("session_bytes", where="disk") > 0
    assert http.delete(f"/v1/documents/{made['id']}").json()["deleted"]
    assert list(tmp_path.glob("sessions/*session*")) == []
    assert http.get("/v1/documents").json()["data"] == []


def test_both_limits_hold_and_the_oldest_use_goes_first(start: Start, tmp_path: Path) -> None:
    server, http = start()
    asked(http, book(201))
    written(server, 1)
    disk, device = (one.bytes for one in server.service.loaded.store.list())
    server, http = start(device=int(1.5 * device), disk=int(2.5 * disk))
    for seed in (202, 201, 203):  # 201 is used again, so 202 goes
        asked(http, book(seed))
        settled(server)
    written(server, 2)
    until(lambda: len(list(tmp_path.glob("sessions/*.session"))) == 2)
    assert places(server) == ["disk", "disk", "device"]
    before = server.metric("prefills_total")
    assert asked(http, book(201)).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert server.metric("prefills_total") == before
    assert asked(http, book(202)).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    written(server, 2)


def settled(server: Background) -> None:
    """What was to be written is written."""
    store: Any = server.service.loaded.store
    store._writer.submit(int).result()


def flip(folder: Path) -> None:
    path = next(folder.glob("kv-*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = next(folder.glob("kv-*"))
    path.write_bytes(path.read_bytes()[:-1])


def another_model(folder: Path) -> None:
    """As if other weights had written it: the manifest is whole, its fingerprint is not ours."""
    from dataclasses import replace

    made = read_manifest(folder)
    replace(made, identity=made.identity | {"weights": "0" * 32}).write(folder)


@pytest.mark.parametrize(
    ("harm", "words"), [(flip, "XXH3"), (cut, "the manifest says"), (another_model, "weights '000")]
)
def test_what_does_not_load_is_a_conflict_until_it_is_deleted(
    start: Start, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    server, http = start()
    asked(http, book(204))
    written(server, 1)
    start(device=1)
    (folder,) = tmp_path.glob("sessions/*.session")
    harm(folder)
    server, http = start()
    name = http.get("/v1/documents").json()["data"][0]["id"]
    question = {"question": "Who saw the river?"}
    for _ in range(2):
        reply = http.post(f"/v1/documents/{name}/questions", json=question)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (409, "session_refused")
        assert words in error["message"]
        assert f"DELETE /v1/documents/{name}" in error["message"]
        assert str(tmp_path) not in error["message"]
    assert asked(http, book(204)).status_code == 409
    (told,) = http.get("/v1/documents").json()["data"]
    assert told["status"] == "refused"
    assert words in told["error"]
    assert http.delete(f"/v1/documents/{name}").status_code == 200
    assert asked(http, book(204)).status_code == 200


def test_a_session_of_another_method_is_a_conflict(start: Start) -> None:
    server, http = start()
    asked(http, book(205))
    written(server, 1)
    _, http = start(method="ring")
    reply = asked(http, book(205))
    assert reply.status_code == 409
    assert "was saved with method 'full', here it is 'ring'" in reply.json()["error"]["message"]


def test_a_session_pruned_before_it_is_loaded_is_prefilled(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, http = start()
    asked(http, book(206))
    written(server, 1)
    server, http = start()
    store: Any = server.service.loaded.store
    loading = store.loading

    def pruned(key: str) -> Any:
        found = loading(key)
        store._prune(0)
        return found

    monkeypatch.setattr(store, "loading", pruned)
    assert asked(http, book(206)).status_code == 200
    assert server.metric("prefills_total") == 1


def test_two_servers_do_not_share_a_folder(start: Start, engine: apb_jax.Engine, tmp_path: Path) -> None:
    start()
    with pytest.raises(UserError, match="another server's"):
        DiskStore(engine, DeviceStore(1), tmp_path / "sessions", 1)


def test_a_document_that_cannot_fit_is_refused_before_its_prefill(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apb_jax.serve.memory import MemoryPlan

    server, http = start()
    # What lives on a simulated device is counted over the process: arrays of other tests would count as this server's.
    monkeypatch.setattr(MemoryPlan, "used", lambda self: self.memory(1).components["weights"])
    memory: MemoryPlan = server.service.loaded.worker.memory
    small, large = (memory.memory(n).bytes_per_device for n in (600, 6000))
    server, http = start(memory=(small + large) // 2)
    assert asked(http, book(207)).status_code == 200
    for reply in (asked(http, book(207, 600)), http.post("/v1/documents", json={"text": book(207, 600)})):
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "memory_exceeded")
        assert "document tokens under full need" in error["message"]
        assert "a document of at most" in error["message"]
    assert server.metric("prefills_total") == 1


def test_what_fits_an_empty_server_but_not_this_one_is_507(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept sessions go first; what is left is held by others."""
    server, http = start(memory=1 << 40)
    asked(http, book(208))
    worker = server.service.loaded.worker
    held = [1 << 40]
    monkeypatch.setattr(type(worker.memory), "used", lambda self: held[0])
    reply = asked(http, book(209))
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, "insufficient_memory")
    assert "try again later" in reply.json()["error"]["message"]
    assert "device" not in places(server)
    held[0] = 0
    assert asked(http, book(209)).status_code == 200
