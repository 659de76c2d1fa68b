"""One visitor: their own files, under the served name, at a bounded cost, while they listen."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from vitomr.reading.choices import Decoding
from vitomr.serving import (
    MAX_COST,
    Listeners,
    RefusedError,
    ServedHosts,
    Shelf,
    Turns,
    UploadsOnly,
    Watch,
    boxes_from,
    check_cost,
    decoding_from,
    is_served,
    served_hosts,
    size_of,
    uploaded,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder of uploads with page.png in it, beside secret.png."
    (tmp_path / "uploads" / "a").mkdir(parents=True)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for name in ("uploads/a/page.png", "secret.png"):
        (tmp_path / name).write_bytes(b"picture")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "uploads" / "up").symlink_to(tmp_path)
    (tmp_path / "uploads-of-others").mkdir()
    (tmp_path / "uploads-of-others" / "page.png").write_bytes(b"picture")
    return tmp_path


OTHERS = (
    "secret.png",
    "none.png",
    "uploads/link.png",
    "uploads/up/secret.png",
    "uploads/../secret.png",
    "uploads/a",
    "uploads/none.png",
    "uploads-of-others/page.png",
    "/etc/passwd",
    "x" * 5000,
    "a\0b",
)


@pytest.mark.parametrize("path", [*OTHERS, 7, ["a"], {"path": "a"}, True])
@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}, {"url": "http://127.0.0.1/a"}])
def test_only_what_was_uploaded_is_read_and_the_answer_is_the_same(folder, path, meta):
    given = str(folder / path) if isinstance(path, str) else path
    with pytest.raises(RefusedError) as e:
        uploaded({"path": given, **meta})
    assert str(e.value) == "this file was not uploaded to this app, or an hour ago; upload it"


def test_an_upload_is_read(folder):
    page = folder / "uploads" / "a" / "page.png"
    assert uploaded({"path": str(page)}) == uploaded(str(page)) == str(page.resolve())
    assert uploaded(None) is None and uploaded({"path": None}) is None and uploaded("") is None


def client(*middleware) -> TestClient:
    async def echo(request):
        return JSONResponse(await request.json())

    async def stream(request):
        return StreamingResponse(iter([b"data: 1\n\n"]))

    async def join(request):
        return JSONResponse({"event_id": "e1"})

    routes = [Route("/gradio_api/call/read", join, methods=["POST"]), Route("/gradio_api/call/read/{event}", stream)]
    routes.append(Route("/{any:path}", echo, methods=["GET", "POST"]))
    return TestClient(Starlette(routes=routes, middleware=list(middleware)), base_url="http://127.0.0.1:7860")


def test_a_message_with_the_path_of_another_file_is_turned_away(folder):
    app, page = client(Middleware(UploadsOnly)), str(folder / "uploads" / "a" / "page.png")
    good = {"data": [{"path": page}, "text", 1, None, {"a": [{"path": None}]}]}
    assert app.post("/gradio_api/queue/join", json=good).json() == good
    for path in (str(folder / "secret.png"), str(folder / "none.png"), 3):
        for data in ([{"path": path}], [[{"deep": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]]):
            for kind in ("application/json", "text/plain"):
                answer = app.post("/any", content=json.dumps({"data": data}), headers={"content-type": kind})
                assert answer.status_code == 400 and "not uploaded" in answer.json()["error"]
    assert app.post("/any", content="[" * 200_000).status_code == 400
    assert app.post("/any", content=b"[" + b" " * 17_000_000).status_code == 413


@pytest.mark.parametrize(
    ("server", "more", "served", "refused"),
    [
        (None, {}, "127.0.0.1 127.0.0.1:7860 localhost:7860 [::1]:7860 LOCALHOST.", "evil.example 10.0.0.7 [::2]:7860"),
        ("omr.lan", {}, "omr.lan:80 localhost", "omr.lan.evil.example 192.168.0.1"),
        ("0.0.0.0", {}, "192.168.0.1:7860 [fe80::1]", "evil.example 0x7f000001.evil"),
        (None, {"VITOMR_HOSTS": "omr.example, *.music.example"}, "omr.example a.music.example", "xmusic.example"),
        (None, {"SPACE_ID": "a/b", "SPACE_HOST": "a-b.hf.space"}, "a-b.hf.space", "hf.space.evil.example"),
    ],
)
def test_only_the_served_name_is_answered(monkeypatch, server, more, served, refused):
    for name in ("GRADIO_SERVER_NAME", "VITOMR_HOSTS", "SPACE_ID", "SPACE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for k, v in more.items():
        monkeypatch.setenv(k, v)
    app = client(Middleware(ServedHosts, names=served_hosts(server)))
    for host in served.split():
        assert app.post("/any", json=1, headers={"host": host}).status_code == 200, host
    for host in (*refused.split(), "", "a b", "127.0.0.1:7860:1", "127.0.0.1@evil.example"):
        assert app.post("/any", json=1, headers={"host": host}).status_code == 421, host
    assert not is_served("evil.example", served_hosts(server))


def test_who_does_not_come_for_an_answer_has_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("vitomr.serving.time", SimpleNamespace(monotonic=lambda: now[0]))
    listeners = Listeners(lambda event: "s1" if event == "e1" else None, grace=20)
    left = lambda: (listeners.has_left("e1"), listeners.has_left("s1"))
    assert not listeners.has_left("unknown") and not listeners.has_left(None)
    app = client(Middleware(listeners.middleware))
    assert app.post("/gradio_api/call/read", json=1).json() == {"event_id": "e1"}
    now[0] += 19
    assert left() == (False, False)
    now[0] += 2
    assert left() == (True, True) and listeners.has_left("unknown") and not listeners.has_left(None)
    during = []

    async def held(scope, receive, send):
        now[0] += 1000
        during.append(left())

    for path, query in (("/gradio_api/call/read/e1", b""), ("/gradio_api/queue/data", b"session_hash=s1")):
        scope = {"type": "http", "method": "GET", "path": path, "query_string": query}
        asyncio.run(listeners.middleware(held)(scope, None, None))
        now[0] += 19
        assert not listeners.has_left("s1")
        now[0] += 2
        assert left() == (True, True)
    assert during == [(False, False), (True, False)]  # the second stream names the session alone


def test_a_reading_ends_when_nobody_waits_or_when_it_takes_too_long(monkeypatch):
    monkeypatch.setattr("vitomr.serving.session", lambda: "s1")
    listeners = Listeners(grace=-1.0)
    with pytest.raises(RefusedError, match="nobody waits"):
        Watch(listeners).check()
    Watch(Listeners(grace=60)).check()
    with pytest.raises(RefusedError, match="more than -1 s"):
        Watch(Listeners(grace=60), seconds=-1).check()


def test_the_cost_of_a_request_has_a_limit():
    check_cost(Decoding(shifts=2), MAX_COST // 2)
    with pytest.raises(RefusedError, match=f"at most {MAX_COST}"):
        check_cost(Decoding(shifts=2), MAX_COST // 2 + 1)
    for n in (0, 10**9, -1, 2.5, "3", None, True, float("nan")):
        with pytest.raises(RefusedError, match="samples"):
            check_cost(Decoding(), 1, n)


@pytest.mark.parametrize("name", ["beam", "temperature", "top_k", "top_p", "seed", "second_look", "shifts", "grammar"])
@pytest.mark.parametrize("value", [10**30, -1, float("inf"), float("nan"), "x" * 999, None, [1], {"a": 1}])
def test_a_choice_that_is_none_is_one_line(name, value):
    with pytest.raises(ValueError) as e:
        decoding_from(100, **{name: value})
    assert "\n" not in str(e.value) and len(str(e.value)) <= 200


def test_boxes_come_as_json():
    assert boxes_from('{"0": [[1, 2, 30, 40]]}') == {0: [[1.0, 2.0, 30.0, 40.0]]} and boxes_from(None) is None
    wrong = ("{", "[" * 50_000, "[]", "9" * 200_000, '{"0": [[1]]}', '{"a": []}', '{"0": [[1, 2, 3, "4"]]}', '{"0": 5}')
    for text in wrong:
        with pytest.raises(RefusedError, match="expected JSON"):
            boxes_from(text)
    with pytest.raises(RefusedError, match="64"):
        boxes_from(json.dumps({"0": [[0, 0, 1, 1]] * 65}))


def test_an_upload_that_is_used_is_kept(folder):
    "Files are deleted by their time of change; a use renews it."
    import os

    page = folder / "uploads" / "a" / "page.png"
    os.utime(page, (1, 1))
    uploaded(str(page))
    assert page.stat().st_mtime > 1e9


def test_turns_are_taken_in_order_and_left_ones_make_room(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vitomr.serving.time", SimpleNamespace(monotonic=lambda: now[0]))
    turns = Turns(patience=60)
    with turns.place() as first, turns.place() as second, turns.place() as third:
        assert [first(), second(), third()] == [0, 1, 2]
        now[0] += 61  # the first one reads and asks, the second one has gone without a word
        assert [first(), third()] == [0, 1]
    with turns.place() as next_one:
        assert next_one() == 0


def test_the_shelf_is_bounded_and_its_keys_are_not_guessed():
    shelf = Shelf(most=1000)
    keys = [shelf.put({"picture": np.zeros(300, np.uint8), "n": i}) for i in range(50)]
    kept = [k for k in keys if shelf.get(k) is not None]
    assert kept == keys[-3:] and shelf.size <= 1000 and len(set(keys)) == 50 and min(map(len, keys)) >= 32
    assert shelf.put("x" * 100, keys[-1]) == keys[-1] and shelf.get(keys[-1]) == "x" * 100
    assert shelf.put(None) is None and shelf.get(None) is None
    view = np.zeros(400, np.uint8)[10:20]
    assert size_of([view, view.base, {"a": view}]) == 400  # each array once, a view as what it keeps alive
