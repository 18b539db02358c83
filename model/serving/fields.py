"""The parts of requests: what a prompt, a stop, a message may be, and how JSON becomes one of our types.

Knows nothing of jobs and of HTTP.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json
from typing_extensions import Self

from model.serving.errors import ApiError, of_validation, shown

MOST_TOKENS = 2**31 - 1
RequestT = TypeVar("RequestT", bound="Strict")


def _refuse(value: Any) -> Any:
    if value:
        raise PydanticCustomError("unsupported", "is not supported")
    return value


def bad_value(message: str) -> PydanticCustomError:
    """Return the error with which a validator refuses a value."""
    return PydanticCustomError("value", message)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(t) is int and 0 <= t <= MOST_TOKENS for t in value)


def read_prompts(value: Any) -> Any:
    """Return a list of prompts, each text or ids, from any of the four forms that OpenAI allows."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(p, str) for p in value) or all(_ids(p) and p for p in value):
            return value
        if _ids(value):
            return [value]
    raise bad_value(
        "must be a string, a list of strings, a list of token ids, or a list of such lists; none of them empty"
    )


def read_stops(value: Any) -> Any:
    """Return a list of stop strings from one or several."""
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) <= 16 and all(isinstance(s, str) and 0 < len(s) <= 256 for s in stops):
        return stops
    raise bad_value("must be a string or a list of at most 16, each of 1 to 256 characters")


def read_content(value: Any) -> Any:
    """Return a message's text, the parts of one joined by line breaks."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value
    ):
        return "\n".join(p["text"] for p in value)
    raise bad_value("must be a string or a list of {'type': 'text', 'text': …}; images and sound are not supported")


def read_biases(value: Any) -> Any:
    """Return biases by token id; JSON has names as keys."""
    if not isinstance(value, dict) or len(value) > 1024:
        raise bad_value("must map at most 1,024 token ids to numbers from -100 to 100")
    biases = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise bad_value(f"{shown(key)} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise bad_value(f"the bias {shown(bias)} of token {key} is outside -100 to 100")
        biases[int(key)] = float(bias)
    return biases


Refused = Annotated[Any, AfterValidator(_refuse)]


class Strict(BaseModel):
    """No value is bent to another type; null is the same as absent; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


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
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise bad_value(f"a message of role {self.role} needs a content")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message as a template takes it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """Return a request from JSON. Raises ApiError with status 400 and, where there is one, the field at fault."""
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
