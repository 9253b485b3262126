"""Checkpoints of OpenMMLab: fetched over https and checked, loaded without running what they hold."""

import hashlib
import http.server
import pickle
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from torchferry.codebases.openmmlab import checkpoints, libraries
from torchferry.codebases.openmmlab.checkpoints import fetch, load_weights
from torchferry.core.errors import CheckpointError, ConfigError, IntegrityError

needs_mmengine = pytest.mark.skipif(
    not libraries.installed("mmengine"), reason="OpenMMLab is not installed; scripts/openmmlab installs it"
)
CONTENT = b"weights" * 1000
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]
GOOD = f"net-{DIGITS}.pth"


class Files(http.server.BaseHTTPRequestHandler):
    """Serves the same content under every name, except where the name says otherwise."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/gone"):
            self.send_error(404)
            return
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/{GOOD}")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) + (9 if self.path.startswith("/short") else 0)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Does not mind clients that leave."""

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[http.server.HTTPServer]:
    """An https server with a certificate of its own, made for this test."""
    certificate = Path(__file__).with_name("localhost.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(("localhost", 0), Files)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.asked = []
    trusting = ssl.create_default_context(cafile=certificate)
    server.opener = urllib.request.build_opener(
        checkpoints._OnlyHttps(), urllib.request.HTTPSHandler(context=trusting), urllib.request.ProxyHandler({})
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: http.server.HTTPServer, path: str) -> str:
    return f"https://localhost:{server.server_port}/{path}"


def test_a_file_is_fetched_once_and_checked(server: http.server.HTTPServer, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    first = fetch(address(server, GOOD), tmp_path, progress=lambda *each: told.append(each), opener=server.opener)
    asked = len(server.asked)
    assert first.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert fetch(address(server, GOOD), tmp_path, opener=server.opener) == first
    assert len(server.asked) == asked
    first.write_bytes(b"damaged")
    assert fetch(address(server, GOOD), tmp_path, opener=server.opener).read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == [GOOD]


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("net-00000000.pth", IntegrityError, f"its SHA-256 starts with {DIGITS}, expected 00000000"),
        (f"short/{GOOD}", CheckpointError, "ended after"),
        (f"gone/{GOOD}", CheckpointError, "Not Found"),
        (f"elsewhere/{GOOD}", ConfigError, "must be an https address, got 'http'"),
        ("net.pth", ConfigError, "no digits of its SHA-256"),
        ("net-0123.pth", ConfigError, "no digits of its SHA-256"),
    ],
)
def test_nothing_is_kept_of_what_is_not_right(
    server: http.server.HTTPServer, tmp_path: Path, path: str, error: type, words: str
) -> None:
    with pytest.raises(error) as raised:
        fetch(address(server, path), tmp_path, opener=server.opener)
    assert words in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_file_without_an_end_is_given_up(
    server: http.server.HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_MOST_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than"):
        fetch(address(server, GOOD), tmp_path, opener=server.opener)
    assert not list(tmp_path.iterdir())


def test_an_unknown_certificate_is_refused(server: http.server.HTTPServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(address(server, GOOD), tmp_path)


@pytest.mark.parametrize("scheme", ["http", "ftp", "file", "s3"])
def test_other_schemes_are_refused(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"must be an https address, got '{scheme}'"):
        fetch(f"{scheme}://localhost/{GOOD}", tmp_path)


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3))


class Evil:
    """What runs code when it is unpickled without care."""

    def __reduce__(self) -> tuple:
        return (open, ("pwned", "w"))


@needs_mmengine
def test_a_checkpoint_of_a_training_is_loaded_with_its_history(tmp_path: Path) -> None:
    HistoryBuffer = libraries.mmengine("mmengine.logging").HistoryBuffer
    trained = net()
    history = HistoryBuffer([1.0, 0.5], [1, 1])
    meta = {"epoch": 3, "loss": np.float64(0.25), "seen": np.int64(7), "curve": np.arange(3)}
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": 2}}
    torch.save({"meta": meta, "state_dict": trained.state_dict(), "message_hub": hub}, tmp_path / "epoch.pth")
    fresh = net()
    assert "weights found under 'state_dict'" in load_weights(fresh, tmp_path / "epoch.pth")[0]
    assert torch.equal(fresh[0].weight, trained[0].weight)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": net().state_dict(), "message_hub": Evil()}, "evil.pth")
    with pytest.raises(CheckpointError, match="would run; refused"):
        load_weights(net(), "evil.pth")
    assert not Path("pwned").exists()
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        load_weights(net(), "plain.pth")
    assert not Path("pwned").exists()


def test_the_allow_list_ends_with_the_loading(tmp_path: Path) -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    torch.save(net().state_dict(), tmp_path / "net.pth")
    load_weights(net(), tmp_path / "net.pth")
    assert set(map(str, torch.serialization.get_safe_globals())) == before
