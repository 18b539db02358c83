"""The fields of requests: what a prompt, a stop, a message may be, and how JSON becomes a request.

Knows nothing of sequences and of HTTP.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json
from typing_extensions import Self

from model.serving.http.errors import ApiError, of_validation, shown

MAX_TOKENS = 2**31 - 1  # of any count, and of any token id
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024
RequestT = TypeVar("RequestT", bound="Strict")


def _refuse(value: Any) -> Any:
    if value:
        raise PydanticCustomError("unsupported", "is not supported")
    return value


def bad_value(message: str) -> PydanticCustomError:
    """Return the error with which a validator refuses a value."""
    return PydanticCustomError("value", message)


def _is_ids(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(type(token) is int and 0 <= token <= MAX_TOKENS for token in value)


def read_prompts(value: Any) -> Any:
    """Return a list of prompts, each text or ids, from any of the four forms that OpenAI allows."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(prompt, str) for prompt in value):
            return value
        if all(_is_ids(prompt) and prompt for prompt in value):
            return value
        if _is_ids(value):
            return [value]
    raise bad_value(
        "must be a string, a list of strings, a list of token ids, or a list of such lists; "
        "none of them empty"
    )


def read_stops(value: Any) -> Any:
    """Return a list of stop strings from one or several."""
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) <= MAX_STOPS and all(map(_is_stop, stops)):
        return stops
    raise bad_value(
        f"must be a string or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} "
        "characters"
    )


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_STOP_LENGTH


def read_content(value: Any) -> Any:
    """Return a message's text, the parts of one joined by line breaks."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(map(_is_text_part, value)):
        return "\n".join(part["text"] for part in value)
    raise bad_value(
        "must be a string or a list of {'type': 'text', 'text': …}; "
        "images and sound are not supported"
    )


def _is_text_part(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("type") != "text":
        return False
    return isinstance(value.get("text"), str)


def read_draft(value: Any) -> Any:
    """Return the draft sources under their own name: `medusa` is an alias of `heads`."""
    return "heads" if value == "medusa" else value


def read_biases(value: Any) -> Any:
    """Return biases by token id; JSON has names as keys."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise bad_value(f"must map at most {MAX_BIASES:,} token ids to numbers from -100 to 100")
    biases = {}
    for key, bias in value.items():
        if not _is_id_name(key):
            raise bad_value(f"{shown(key)} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise bad_value(f"the bias {shown(bias)} of token {key} is outside -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def _is_id_name(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10


Refused = Annotated[Any, AfterValidator(_refuse)]


class Strict(BaseModel):
    """No value is bent to another type; null is the same as absent; unknown fields are ignored."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Strict):
    """include_usage: one more chunk, with the usage of all choices."""

    include_usage: bool = False


class JsonSchema(Strict):
    """The schema that an answer must fit; OpenAI's name, description and strict are ignored."""

    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise bad_value("response_format.json_schema is missing")
        return self


class Message(Strict):
    """One turn of a conversation. Parts of text are joined by line breaks."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(read_content)] = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise bad_value(f"a message of role {self.role} needs a content")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message as a chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content or ""}


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """Return a request from JSON.

    Raises ApiError with status 400 and, where there is one, the field at fault.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(data)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise of_validation(error) from None
