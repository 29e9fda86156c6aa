"""Structured logs: one line per event, `key=value` pairs or a JSON object, on standard error.

Prompts and answers are never logged; a request is found by its `request_id`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

_FIELDS = "salver_fields"


def _quoted(value: Any) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' "=\\'):
        return text
    return json.dumps(text)


def _fields_of(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, Any]:
    """What is said of an event, in order; a traceback is one value."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, Any] = {
        "ts": f"{moment}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "msg": record.getMessage(),
    }
    fields.update(getattr(record, _FIELDS, {}))
    if record.exc_info:
        fields["traceback"] = formatter.formatException(record.exc_info)
    return fields


class LineFormatter(logging.Formatter):
    """`ts=... level=info logger=... msg="..." key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_quoted(value)}" for key, value in _fields_of(record, self).items())


class JsonFormatter(logging.Formatter):
    """The same as an object; numbers stay numbers."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields_of(record, self), default=str, ensure_ascii=False)


def log_event(
    logger: logging.Logger, level: int, message: str, *, exc_info: BaseException | None = None, **fields: Any
) -> None:
    """Logs `message` with `fields` as pairs of their own."""
    logger.log(level, message, exc_info=exc_info, extra={_FIELDS: fields})


def set_up_logging(level: str, stream: TextIO | None = None, form: str = "text") -> None:
    """Sends everything of `level` (debug, info, warning, error) and above to `stream`, default stderr.

    `form` is text or json.
    """
    sink = logging.StreamHandler(sys.stderr if stream is None else stream)
    sink.setFormatter(JsonFormatter() if form == "json" else LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [sink]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
