"""A real HTTP server on loopback that speaks the chat protocol, and misbehaves as it is told."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERDICT = {"audio_grounding_score": 1.0, "visual_id_score": 0.5, "location_acc_score": 0.5, "caption_corr_score": 0.0}


class ChatServer:
    """`reply(body, number)` returns the assistant's text, or a behaviour: an int (HTTP status), a name in BEHAVIOURS, a
    message, the bytes of a body, or (HTTP status, headers).

    `number` counts the chat requests from 0. `requests` keeps their bodies, `keys` their Authorization headers.
    """

    BEHAVIOURS = ("stall", "cut", "flood", "drip", "redirect", "not_json", "no_choices", "slow")

    def __init__(
        self, reply: Callable[[dict, int], str | int], model: str = "judge", host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.requests: list[dict] = []
        self.keys: Counter[str] = Counter()
        self.most_at_once = self.at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.send(200, {"object": "list", "data": [{"id": model, "object": "model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.keys[self.headers["authorization"]] += 1
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    self.behave(reply(body, number) if body["model"] == model else 404)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with server._lock:
                        server.at_once -= 1

            def behave(self, what):
                if isinstance(what, int | tuple):
                    status, headers = (what, {}) if isinstance(what, int) else what
                    self.raw(b'{"error": {"message": "as told"}}', status, headers)
                elif isinstance(what, bytes):
                    self.raw(what)
                elif what in ("stall", "slow"):
                    time.sleep(1000 if what == "stall" else 0.3)
                    self.chat("late")
                elif what == "redirect":
                    self.send_response(307)
                    self.send_header("location", "http://127.0.0.1:9/v1/chat/completions")
                    self.send_header("content-length", "0")
                    self.end_headers()
                elif what == "not_json":
                    self.raw(b"<html>no JSON</html>")
                elif what == "no_choices":
                    self.send(200, {"id": "x", "object": "chat.completion", "choices": []})
                elif what == "cut":
                    self.send_response(200)
                    self.send_header("content-length", "100000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                elif what in ("flood", "drip"):
                    self.send_response(200)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(2**40))
                    self.end_headers()
                    self.close_connection = True
                    while True:
                        self.wfile.write(b" " * (2**16 if what == "flood" else 1))
                        self.wfile.flush()
                        if what == "drip":
                            time.sleep(0.05)
                else:
                    self.chat(what)

            def chat(self, said):
                message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
                choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
                reply = {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": choices}
                self.send(200, reply)

            def send(self, status, value):
                self.raw(json.dumps(value).encode(), status)

            def raw(self, data, status=200, headers=()):
                self.send_response(status)
                own = {"content-type": "application/json", "content-length": str(len(data))}
                for name, value in {**own, **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        # shutdown() waits until the server looks up, which it does twice a second unless told otherwise.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":  # in vLLM's place: serve MODEL --port N [more options]
    key = f"Bearer {os.environ.get('VLLM_API_KEY', 'none')}"
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = ChatServer(lambda body, n: json.dumps(VERDICT), sys.argv[2], "", port)
    while True:
        time.sleep(1)
        assert not server.keys.keys() - {key}, "a request with another key"
