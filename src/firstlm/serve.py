# SPDX-License-Identifier: Apache-2.0
"""`firstlm serve`: loads an artifact and serves it until a signal comes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import threading
from dataclasses import replace
from typing import Any

from transformers.utils import logging as transformers_logging

from firstlm.command_config import ServeConfig
from firstlm.errors import ConfigError
from firstlm.model import FirstModel
from firstlm.scheduler import Scheduler

LOG = logging.getLogger("firstlm.server")
LOCAL = ("127.0.0.1", "localhost", "::1")
LINGER = 5  # seconds in which clients may read on once all answers have ended
KEY_VARIABLE = "FIRSTLM_API_KEY"


def run(options: ServeConfig) -> int:
    """Serve until a signal comes."""
    try:
        import uvicorn

        from firstlm.server import Server, create_app
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error}. Install the server with pip install 'firstlm[serve]'."
        ) from error
    key = os.environ.get(KEY_VARIABLE) if options.api_key is None else options.api_key
    if key == "":
        raise ConfigError(f"The API key is empty; leave out --api-key and {KEY_VARIABLE} for none.")
    options = replace(options, api_key=key)
    if options.host not in LOCAL and not options.api_key:
        print(f"Anyone who reaches {options.host} may ask: set --api-key.", file=sys.stderr)
    listener = _bind(options.host, options.port)  # before a model is loaded for nothing
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    transformers_logging.disable_default_handler()  # its warnings are lines of JSON, too
    transformers_logging.enable_propagation()
    model = load(options)
    scheduler = Scheduler(
        model,
        options.batch_size,
        options.queue_size,
        options.engine,
        options.weights,
        options.batch_tokens,
    )
    name = options.name or options.artifact.rstrip("/").rpartition("/")[2]
    server = Server(model, scheduler, options, name)

    class Draining(uvicorn.Server):
        """At the first signal lets answers finish while new requests get 503; not at the second."""

        drain: asyncio.Task[None] | None = None

        def handle_exit(self, sig: int, frame: Any) -> None:
            if server.closing:
                # Joins the thread that answers, so it may not run in this one.
                threading.Thread(target=scheduler.close, args=(0,), daemon=True).start()
                self.should_exit = self.force_exit = True
                return
            server.closing = True
            LOG.info("closing", extra={"fields": {"active": scheduler.active}})
            self.drain = asyncio.get_event_loop().create_task(self._drain())

        async def _drain(self) -> None:
            await asyncio.to_thread(scheduler.close, options.grace)
            self.should_exit = True

    config = uvicorn.Config(
        create_app(server),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=LINGER,
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"Serving {name} at http://{host}:{listener.getsockname()[1]}", file=sys.stderr)
    try:
        Draining(config).run([listener])
    except OSError as error:  # another that was loading, too, listens there now
        raise ConfigError(_not_listening(options.host, options.port, error)) from error
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """Take a port, and do not listen yet; 0 takes one that is free."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(_not_listening(host, port, error)) from error
    return listener


def _not_listening(host: str, port: int, error: OSError) -> str:
    return f"{host}:{port} cannot be listened on: {error.strerror}. Name another --port or --host."


def load(options: ServeConfig) -> FirstModel:
    """Load the artifact as it is served: LoRA beside the weights would cost each prompt a tenth.

    Raises:
        ConfigError: it has no tokenizer.
    """
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    if model.tokenizer is None:
        raise ConfigError(f"{options.artifact} has no tokenizer, so texts cannot be answered.")
    return model.merge_and_unload()


class _JsonLines(logging.Formatter):
    """Writes each record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)
