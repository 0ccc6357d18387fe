"""Errors as clients of the OpenAI API expect them: a status and a body that says what to do."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from holdfast.errors import DoesNotFit, HoldfastError, UsageError
from holdfast.serve.unavailable import Busy, Stopped

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        code: a word that programs may rely on.
        param: the field that is wrong.
        retry: seconds after which to come back.
        more: further fields of the error.
    """

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None,
                 retry: int | None = None, **more: Any):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.retry, self.more = param, retry, more

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code, **self.more}}  # fmt: skip

    def response(self) -> JSONResponse:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def of(error: Exception) -> Refusal:
    """What a client is told about an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Busy):
        return Refusal(429, str(error), "context_budget_full", retry=error.retry_after)
    if isinstance(error, Stopped):
        return Refusal(503, str(error), "shutdown", retry=5)
    if isinstance(error, DoesNotFit):
        return Refusal(400, str(error), "context_length_exceeded", **error.details)
    if isinstance(error, UsageError):
        return Refusal(400, str(error), "invalid_value")
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail), "http")
    return Refusal(500, "the server failed; its log says why", "failed")


def _of_validation(error: RequestValidationError) -> Refusal:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "invalid")
        return Refusal(400, f"the body is not JSON: {reason} at character {where}", "json_invalid")
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return Refusal(422, message, "invalid_value", param=where or None)


def install(app: FastAPI) -> None:
    """Answer all errors of an app in this form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return of(error).response()

    for kind in (Refusal, HoldfastError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
