"""Host, Origin, key, and the size of bodies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fake_worker import FakeWorker
from starlette.testclient import TestClient

from model.serving.http.app import ServerOptions, create_app
from model.serving.http.security import is_loopback

KEY = "sk-péssword"


def client(**options: Any) -> TestClient:
    app = create_app(FakeWorker(), ServerOptions(**options))
    return TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False)


def status(client: TestClient, path: str = "/health", **headers: str) -> int:
    return client.get(path, headers=headers).status_code


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [
        ({}, ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"],
         ["evil.example", "localhost.evil.example", "192.168.1.5", "", "localhost@evil.example",
          "[", "a:b:c"]),
        ({"host": "10.0.0.7"}, ["10.0.0.7:8000", "localhost"], ["10.0.0.8", "evil.example"]),
        ({"host": "box"}, ["box:8000", "localhost"], ["box.evil.example", "10.0.0.8"]),
        ({"host": "0.0.0.0"}, ["192.168.1.5:8000", "[fe80::1]"],
         ["evil.example", "0x7f.1.evil.example"]),
        ({"host": "::"}, ["192.168.1.5:8000", "[fe80::1]:80"], ["evil.example"]),
        ({"allowed_hosts": ("llm.home", "[2001:db8::1]")}, ["llm.home", "[2001:db8::1]:1"],
         ["evil.example"]),
        ({"allowed_hosts": ("*",)}, ["anything.example"], [""]),
    ],
)  # fmt: skip
def test_foreign_hosts_are_refused(
    options: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    c = client(**options)
    assert [status(c, Host=host) for host in right] == [200] * len(right)
    for host in wrong:
        refused = c.get("/health", headers={"Host": host})
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "host", host


def test_pages_of_other_origins_are_refused() -> None:
    plain, open_to = client(), client(cors_origins=("https://chat.example",))
    body = {"prompt": "a"}

    def post(c: TestClient, origin: str) -> Any:
        return c.post("/v1/completions", json=body, headers={"Origin": origin})

    assert post(plain, "http://localhost:8000").status_code == 200  # our own page
    for origin in (
        "http://localhost:9000",
        "https://evil.example",
        "null",
        "http://localhost:8000.evil.example",
    ):
        refused = post(plain, origin)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        assert post(open_to, origin).status_code == 403
    allowed = post(open_to, "https://chat.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    assert (
        post(client(cors_origins=("*",)), "https://any.example").headers[
            "access-control-allow-origin"
        ]
        == "*"
    )


def test_preflights_need_no_key_and_errors_can_be_read() -> None:
    c = client(cors_origins=("https://chat.example",), api_key=KEY)
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    preflight = c.options(
        "/v1/completions", headers=asked | {"Access-Control-Request-Headers": "authorization"}
    )
    assert (
        preflight.status_code == 200
        and "authorization" in preflight.headers["access-control-allow-headers"]
    )
    refused = c.post(
        "/v1/completions", json={"prompt": "a"}, headers={"Origin": "https://chat.example"}
    )
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


def test_the_key_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    c = client(api_key=KEY)
    for path in ("/", "/app.js", "/style.css", "/health"):
        assert status(c, path) == 200, path
    for path in (
        "/v1/models",
        "/metrics",
        "/props",
        "/slots",
        "/v1/nothing",
        "/v1/completions",
        "/health/",
    ):
        assert status(c, path) == 401, path
    right = [f"Bearer {KEY}".encode(), f"bearer  {KEY} ".encode()]
    wrong = [
        b"",
        b"Bearer",
        b"Bearer ",
        KEY.encode(),
        f"Basic {KEY}".encode(),
        b"Bearer sk-p",
        b"Bearer \xff\xfe",
    ]
    wrong += [f"Bearer {KEY}x".encode(), f"Bearer {KEY.upper()}".encode()]
    assert [c.get("/v1/models", headers={b"Authorization": h}).status_code for h in right] == [
        200
    ] * len(right)
    for header in wrong:
        answer = c.get("/v1/models", headers={b"Authorization": header})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error" and KEY not in answer.text
    assert KEY not in caplog.text and KEY not in repr(ServerOptions(api_key=KEY))


def test_large_bodies_are_refused_while_they_arrive() -> None:
    c = client(max_body_bytes=1000)
    fits = b'{"prompt": "' + b"a" * 400 + b'"}'
    assert c.post("/v1/completions", content=fits).status_code == 200
    refused = c.post("/v1/completions", content=b" " * 1001)
    assert refused.status_code == 413 and "1,000 bytes" in refused.json()["error"]["message"]
    read = []

    def chunks() -> Iterator[bytes]:
        for i in range(1000):
            read.append(i)
            yield b" " * 100

    streamed = c.post("/v1/completions", content=chunks())
    assert streamed.status_code == 413 and streamed.json()["error"]["code"] == "too_large"
    assert status(c, **{"Content-Length": "9" * 30}) == 413
    assert status(c, **{"Content-Length": "-5"}) == 413


def test_slow_bodies_are_given_up() -> None:
    async def drip() -> Any:
        app = create_app(FakeWorker(), ServerOptions(body_timeout_s=0.05))
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost")],
            "scheme": "http",
            "http_version": "1.1",
            "server": ("localhost", 80),
            "client": None,
        }
        await app(scope, receive, send)
        return sent

    start, body = asyncio.run(drip())[:2]
    assert start["status"] == 408 and b"within 0.05 s" in body["body"]


def test_the_page_is_guarded_by_its_policy() -> None:
    for path, kind in {
        "/": "text/html",
        "/style.css": "text/css",
        "/app.js": "text/javascript",
    }.items():
        page = client().get(path)
        assert page.status_code == 200 and page.headers["content-type"].startswith(kind)
        policy = page.headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy
            and "unsafe" not in policy
            and "frame-ancestors 'none'" in policy
        )


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "box", "")))
