"""Why a request of HTTP gets no answer, in OpenAI's form."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


class Refusal(Exception):
    """`status` is that of HTTP, `code` and `param` are for programs, `retry_after_s` says when to try again."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def to_dict(self) -> dict[str, Any]:
        """The body."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
