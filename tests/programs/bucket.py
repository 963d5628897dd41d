"""bucket.py FOLDER: serves the bucket "mine" with a subset of Google Cloud Storage's JSON API, and prints its port.

An object is a file in FOLDER/objects with a quoted name. TensorFlow only connects to https://www.googleapis.com, so
the server is also an HTTPS proxy with a self-signed certificate. It runs in a separate process, because TensorFlow
sometimes waits for a response without releasing the GIL.
"""

import http.server
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

NAME = "mine"
# By default, TensorFlow remembers for 5 seconds that an object exists, also if `Bucket.clear` has deleted it. It reads
# this variable when it is imported.
NO_STAT_CACHE = {"GCS_STAT_CACHE_MAX_AGE": "0"}
STORAGE = """class Client:
    def get_bucket(self, name):
        return name
"""


class Objects(Mapping):
    """The objects of the bucket, {name: bytes}."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / quote(name, safe="")

    def __getitem__(self, name: str) -> bytes:
        try:
            return self._file(name).read_bytes()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, data: bytes) -> None:
        new = self.folder.parent / f"{time.monotonic_ns()}.new"
        new.write_bytes(data)
        os.replace(new, self._file(name))

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self):
        return iter(sorted(unquote(entry.name) for entry in os.scandir(self.folder)))

    def __len__(self) -> int:
        return len(os.listdir(self.folder))

    def about(self, name: str) -> dict[str, str]:
        """Returns the metadata of an object as in the API."""
        found = self._file(name).stat()
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(found.st_mtime))
        about = dict(kind="storage#object", bucket=NAME, name=name, size=str(found.st_size), metageneration="1")
        return about | dict(
            generation=str(found.st_mtime_ns), updated=f"{when}.{found.st_mtime_ns // 10**6 % 1000:03}Z"
        )


class Bucket:
    """Context manager that runs the server; gives access to its objects."""

    def __init__(self, folder: Path):
        self.objects, self._log, self._refused = Objects(folder / "objects"), folder / "log", folder / "refused"
        self._certificate = folder / "certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=bucket", "-addext"]
        command += ["subjectAltName=DNS:www.googleapis.com,DNS:storage.googleapis.com"]
        command += ["-keyout", str(folder / "key.pem"), "-out", str(self._certificate)]
        subprocess.run(command, check=True, capture_output=True)
        # A stub of google-cloud-storage, which Orbax uses only to check whether a bucket has real folders.
        self.packages = folder / "packages"
        (self.packages / "google/cloud").mkdir(parents=True)
        (self.packages / "google/cloud/storage.py").write_text(STORAGE)
        self.clear()

    def __enter__(self) -> "Bucket":
        command = [sys.executable, __file__, str(self._log.parent)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        url = f"http://127.0.0.1:{self._server.stdout.readline().strip()}"
        self.variables = {  # environment variables of a process that uses this bucket
            "HTTPS_PROXY": url,
            "https_proxy": url,
            "CURL_CA_BUNDLE": str(self._certificate),
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
            **NO_STAT_CACHE,
        }
        return self

    def __exit__(self, *_) -> None:
        self._server.kill()
        self._server.communicate()

    @property
    def log(self) -> list[str]:
        """All requests so far, as "METHOD path"."""
        return self._log.read_text().splitlines()

    def refuse(self, pattern: str = "(?!)") -> None:
        """Answers requests that match the pattern with "403 Forbidden"; without a pattern, none."""
        new = self._refused.with_suffix(".new")
        new.write_text(pattern)
        os.replace(new, self._refused)  # the server must not read an empty pattern, which refuses everything

    def clear(self) -> None:
        """Deletes all objects and the log, and allows all requests."""
        for name in self.objects:
            del self.objects[name]
        self.refuse()
        self._log.write_text("")


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # responses are sent at once
    folder: Path
    tls: ssl.SSLContext
    objects: Objects
    uploads: dict[str, bytearray]  # unfinished uploads, by object

    def log_message(self, *_):
        """Logs nothing."""

    def handle_expect_100(self) -> bool:
        """Asks for the body at once; otherwise the client waits for a second before it sends it."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def do_CONNECT(self):
        """Switches the connection to HTTPS."""
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False

    def do_GET(self):
        """Handles a request of any method."""
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = self.chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        line = f"{self.command} {self.path}"
        with (self.folder / "log").open("a") as log:
            log.write(line + "\n")
        if re.search((self.folder / "refused").read_text(), line):
            self.respond(403, {"error": {"code": 403, "message": "You may not."}})
        elif not (found := re.fullmatch(rf"(/upload)?(/storage/v1/b)?/{NAME}(?:/o)?(?:/([^/]+))?", url.path)):
            self.respond(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        elif found[1]:
            self.upload(query, body)
        elif found[3]:
            self.object(unquote(found[3]), query if found[2] else {"alt": "media"})
        elif url.path.endswith("/o"):
            self.list(query.get("prefix", ""), query.get("delimiter"))
        else:
            self.respond(200, {"kind": "storage#bucket", "name": NAME, "location": "US"})

    do_POST = do_PUT = do_DELETE = do_GET

    def chunks(self) -> bytes:
        """Reads a chunked request body."""
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return data

    def list(self, prefix: str, delimiter: str | None) -> None:
        """Lists the objects under a prefix, and folders if a delimiter is given."""
        names = [name for name in self.objects if name.startswith(prefix)]
        parts = {name: name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "") for name in names}
        folders = sorted({prefix + first + mark for first, mark, _ in parts.values() if mark})
        items = [self.objects.about(name) for name, (_, mark, _) in parts.items() if not mark]
        self.respond(200, {"kind": "storage#objects", "items": items, "prefixes": folders})

    def object(self, name: str, query: dict[str, str]) -> None:
        """Returns the metadata or the content of an object, or deletes it."""
        if name not in self.objects:
            return self.respond(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        if self.command == "DELETE":
            if not self.matches(name, query):
                return
            del self.objects[name]
            return self.respond(204, b"")
        if query.get("alt") != "media":
            return self.respond(200, self.objects.about(name))
        data, headers = self.objects[name], {"x-goog-generation": self.objects.about(name)["generation"]}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.respond(200, data, headers)
        first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.respond(416, b"")
        self.respond(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def matches(self, name: str, query: dict[str, str]) -> bool:
        """Responds with an error unless the object has the generation that the request names; 0 is no object."""
        generation = self.objects.about(name)["generation"] if name in self.objects else "0"
        if query.get("ifGenerationMatch", generation) == generation:
            return True
        self.respond(412, {"error": {"code": 412, "message": f"The generation is {generation}."}})
        return False

    def upload(self, query: dict[str, str], body: bytes) -> None:
        """Uploads an object in one request, or in several, of which the last creates it."""
        name = query["name"]
        if query["uploadType"] == "media":
            if not self.matches(name, query):
                return
            self.objects[name] = body
            return self.respond(200, self.objects.about(name))
        if self.command == "POST":
            self.uploads[name] = bytearray()
            return self.respond(200, b"", {"Location": f"https://www.googleapis.com{self.path}"})
        self.uploads[name] += body
        if self.headers.get("Content-Range", "/").rpartition("/")[2] in ("", str(len(self.uploads[name]))):
            self.objects[name] = bytes(self.uploads.pop(name))
            return self.respond(200, self.objects.about(name))
        self.respond(308, b"", {"Range": f"bytes=0-{len(self.uploads[name]) - 1}"})

    def respond(self, status: int, content: dict | bytes, headers: Mapping[str, str] = {}) -> None:
        """Sends a response."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def main(folder: Path) -> None:
    Handler.folder, Handler.objects, Handler.uploads = folder, Objects(folder / "objects"), {}
    Handler.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    Handler.tls.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()  # until the parent process ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
