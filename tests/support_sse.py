"""A server of nothing but events, for clients: `python support_sse.py PORT [PAUSE] [TOKENS]`."""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = int(sys.argv[1])
PAUSE = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
MOST = int(sys.argv[3]) if len(sys.argv) > 3 else 1000  # tokens after which every answer ends


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not asked["prompt"]:
            self.send_error(400, "no prompt")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = min(asked["max_tokens"], MOST)
        for place in range(count):
            self.event({"choices": [{"text": " Paris" if place == 0 else f" {place}"}], "usage": None})
            time.sleep(PAUSE)
        self.event({"choices": [], "usage": {"completion_tokens": count}})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")
        self.close_connection = True

    def event(self, content: object) -> None:
        self.chunk(f"data: {json.dumps(content)}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: whoever reads the log reads for errors."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
