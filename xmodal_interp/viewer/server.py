"""A local page of a store: rows are computed from queries and keys when the page asks for them.

The server listens on 127.0.0.1 only. It answers only requests whose ``Host`` is its own address, so
that a page of another site cannot read samples through a name that resolves to this machine.

=====================  ==========================================================================
``/``                  the page
``/sample?sample=0``   description of a sample, JSON
``/rows?sample=0&query=3``  numbers of a query: length of a JSON header (uint32, padded to 8 bytes),
                       the header, padded to 8 bytes, and the arrays
=====================  ==========================================================================
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from xmodal_interp.arguments import as_list, whole_number
from xmodal_interp.at import Selector
from xmodal_interp.attention import Positions
from xmodal_interp.errors import InputError, XmodalError
from xmodal_interp.escaping import printable
from xmodal_interp.sample import Sample
from xmodal_interp.store import Store
from xmodal_interp.viewer.header import header_of
from xmodal_interp.viewer.page import packed, page
from xmodal_interp.viewer.rows import Heads, ShownRows, shown_rows
from xmodal_interp.vocabulary import Tower

HOST = "127.0.0.1"

_MOST_KEPT = 8  # samples whose tables and pictures are kept in memory


def serve(
    samples: Iterable[Sample],
    *,
    port: int = 0,
    layers: Positions | None = None,
    queries: Selector | None = None,
    heads: Heads = None,
    tower: Tower | None = None,
    image: int = 0,
    rollout: bool = True,
) -> ViewServer:
    """Return a server of a page of samples; nothing is computed before the page asks for it.

    Use it as a context manager, or call ``close`` at the end::

        with serve(xi.open_store("runs/shapes")) as server:
            print(server.url)
            server.wait()

    Args:
        samples: A store, or a list of samples.
        port: The port; a free one if 0.
        layers: Layers to show; see :func:`view`.
        queries: Query tokens to show; see :func:`view`.
        heads: Heads whose rows are shown; all if not given.
        tower: ``"language"`` or ``"vision"``.
        image: Index of the image in the vision tower.
        rollout: Whether rollout is offered.

    Raises:
        InputError: There are no samples, or the port is in use.
    """
    whole_number(port, "port", 0, 65535)
    given = samples if isinstance(samples, Store) else as_list(samples, "samples")
    if not len(given):
        raise InputError("samples is empty. Pass at least one sample.")
    options = {
        "layers": layers,
        "queries": queries,
        "heads": "all" if heads is None else heads,
        "tower": tower,
        "image": image,
        "rollout": rollout,
        "most_bytes": float("inf"),
    }
    return ViewServer(given, port, options)


class ViewServer:
    """A running server; see :func:`serve`.

    Attributes:
        port: The port.
        url: Address of the page.
    """

    def __init__(self, samples: Any, port: int, options: dict[str, Any]) -> None:
        self._samples, self._options = samples, options
        self._kept: dict[int, ShownRows] = {}
        self._lock = threading.Lock()  # one computation at a time: torch uses all cores
        try:
            self._server = ThreadingHTTPServer((HOST, port), partial(_Handler, self))
        except OSError as error:
            raise InputError(
                f"Port {port} of {HOST} cannot be used: {error.strerror}. Pass another port."
            ) from error
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://{HOST}:{self.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> ViewServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Wait until the server is closed; Ctrl-C raises KeyboardInterrupt."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def document(self) -> bytes:
        """Return the page without samples."""
        names = getattr(self._samples, "names", None) or [each.name for each in self._samples]
        header = {
            "titles": [printable(name, lines=False) for name in names],
            "n_given": len(names),
        }
        return page(header, None, "Attention viewer").encode()

    def described(self, index: int) -> bytes:
        """Return the description of a sample as JSON."""
        with self._lock:
            rows = self._rows(index)
            store = isinstance(self._samples, Store)
            source = f"samples[{index}]"
            if store:
                source = f"xi.open_store({str(self._samples.path)!r})[{rows.sample.name!r}]"
            header = header_of(rows, rows.sample.name, source)
        return json.dumps(header, allow_nan=False).encode()

    def numbers(self, index: int, query: int) -> bytes:
        """Return codes and sums of one query."""
        with self._lock:
            rows = self._rows(index)
            if not 0 <= query < len(rows.queries):
                raise InputError(f"There is no query {query}: there are {len(rows.queries)}.")
            one = rows.queries[query : query + 1]
            arrays = {**rows.codes(one), **rows.sums(one)}
        arrays.pop("error")
        about, data = packed(arrays)
        head = json.dumps(about).encode()
        head += b" " * (-len(head) % 8)
        return struct.pack("<II", len(head), 0) + head + data

    def _rows(self, index: int) -> ShownRows:
        if not 0 <= index < len(self._samples):
            raise InputError(f"There is no sample {index}: there are {len(self._samples)}.")
        if index not in self._kept:
            while len(self._kept) >= _MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[index] = shown_rows(self._samples[index], **self._options)
        return self._kept[index]


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of the page."""

    def __init__(self, server: ViewServer, *arguments: Any) -> None:
        self._view = server
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer a request."""
        own = [f"{name}:{self._view.port}" for name in (HOST, "localhost")]
        if self.headers.get("Host") not in own:
            self._answer(403, "application/json", b'{"error": "Use the address of the server."}')
            return
        address = urlsplit(self.path)
        try:
            given = {name: int(values[0]) for name, values in parse_qs(address.query).items()}
            if address.path == "/":
                self._answer(200, "text/html; charset=utf-8", self._view.document())
            elif address.path == "/sample":
                self._answer(200, "application/json", self._view.described(given["sample"]))
            elif address.path == "/rows":
                data = self._view.numbers(given["sample"], given["query"])
                self._answer(200, "application/octet-stream", data)
            else:
                self._answer(404, "application/json", b'{"error": "There is no such page."}')
        except (KeyError, ValueError, XmodalError) as error:
            problem = str(error) if isinstance(error, XmodalError) else "The request is not valid."
            status = 500 if isinstance(error, XmodalError) else 400
            self._answer(status, "application/json", json.dumps({"error": problem}).encode())

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
