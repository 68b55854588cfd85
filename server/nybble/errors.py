"""Every error raised on purpose, one class each, with what HTTP says of it. No fastapi, no torch."""

from __future__ import annotations

from typing import ClassVar


class NybbleError(Exception):
    """A failure with a message for the reader, the parameter it is about, and a hint on what to do."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry_after: ClassVar[int | None] = None
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param


class InvalidRequest(NybbleError):
    status, type = 400, "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"

    @classmethod
    def of(cls, limit: int, prompt: int, completion: int, param: str = "messages") -> ContextLengthExceeded:
        """OpenAI's own wording: clients recognise the overflow by this text."""
        return cls(
            f"This model's maximum context length is {limit} tokens. "
            f"However, you requested {prompt + completion} tokens "
            f"({prompt} in the {param}, {completion} in the completion). "
            f"Please reduce the length of the {param} or completion.",
            param=param,
        )


class Unauthorized(NybbleError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class ModelNotFound(NybbleError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class PayloadTooLarge(NybbleError):
    status, type, code = 413, "invalid_request_error", "payload_too_large"


class HeadersTooLarge(NybbleError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class BodyTimeout(NybbleError):
    status, type, code = 408, "invalid_request_error", "body_timeout"


class QueueFull(NybbleError):
    status, code, retry_after = 503, "queue_full", 1


class NotReady(NybbleError):
    status, code, retry_after = 503, "not_ready", 2


class ShuttingDown(NybbleError):
    status, code, retry_after = 503, "shutting_down", 5


class EngineStopped(NybbleError):
    status, code, retry_after = 503, "engine_stopped", 5


class RequestFailed(NybbleError):
    status, code = 500, "request_failed"


class UsageError(NybbleError):
    """The command line or a setting is wrong: what, where, and a hint. Printed as two lines, no traceback."""

    exit_code = 2


class CheckpointError(NybbleError):
    """A model folder or file cannot be used: which file, which tensor, expected and found."""

    exit_code = 2
