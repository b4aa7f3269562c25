"""Requests and responses as JSON, in OpenAI's shapes and vLLM's words; a field that would be ignored is refused.

OpenAI: https://platform.openai.com/docs/api-reference ; vLLM: vllm/entrypoints/openai/protocol.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}") from None
    return text


def _integral(value: object) -> object:
    """1.0 is an integer in JSON; true is none, though Python takes it for 1."""
    if isinstance(value, bool):
        raise ValueError("input should be a number, not a boolean")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: object) -> object:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError("input should be a boolean, not a number")
    return value


Integer = Annotated[int, BeforeValidator(_integral)]
One = Annotated[Literal[1], BeforeValidator(_integral)]
Zero = Annotated[Literal[0], BeforeValidator(_integral)]
String = Annotated[str, AfterValidator(_whole_characters)]
StopString = Annotated[String, Field(min_length=1, max_length=256)]
SessionId = Annotated[String, Field(max_length=128)]
TokenId = Annotated[Integer, Field(ge=0)]
Count = Annotated[Integer, Field(ge=1, lt=2**31)]


def _absent(value: object) -> bool:
    return value is None


Absent = Field(default=None, exclude_if=_absent)
"""A field that is left out where it says nothing, rather than null."""


class Request(BaseModel):
    """Unknown fields, and values of another type, are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Request):
    include_usage: bool | None = None


class Generation(Request):
    """What completions and chats have in common. A null means the default."""

    model: String | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1)] | None = Field(None, description="0 and -1: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[Integer, Field(ge=0, lt=2**31)] = 0
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    cache_prompt: bool = Field(True, description="start from what a slot still holds of the prompt")
    session_id: SessionId | None = Field(None, description="kept in the log")
    user: String | None = Field(None, description="accepted, not used")
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class CompletionRequest(Generation):
    prompt: (
        String
        | Annotated[list[String], Field(min_length=1, max_length=1, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
    )
    logprobs: Annotated[Integer, Field(ge=0, le=40)] | None = None
    echo: Annotated[Literal[False], BeforeValidator(_boolean)] | None = None
    best_of: One | None = None
    suffix: Literal[""] | None = None


class TextPart(Request):
    type: Literal["text"]
    text: String


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: String | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    refusal: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
"""Validation ends at the first that is wrong: an error for each of half a million would take the memory of a model."""


class TextFormat(Request):
    type: Literal["text"]


class ChatCompletionRequest(Generation):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=40)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None


class ChatRequest(Request):
    """The article's."""

    messages: Messages
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.1
    max_tokens: Count = Field(2048, description="clamped to what the slot has left")
    session_id: SessionId = "default"


class TokenizeRequest(Request):
    prompt: String
    add_special_tokens: bool = True
    model: String | None = None


class DetokenizeRequest(Request):
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    model: String | None = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = Absent


class Completion(BaseModel):
    """A whole completion, and each chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Absent


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = Absent


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = Absent
    content: str | None = Absent


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = Absent


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Absent


class ChatData(BaseModel):
    response: str
    prompt_tokens: int
    completion_tokens: int
    session_id: str
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    code: Literal[200] = 200
    message: Literal["success"] = "success"
    data: ChatData


class ChatError(BaseModel):
    code: int
    message: str
    data: None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class HealthData(BaseModel):
    status: Literal["loading", "ok", "stopping", "unreachable"]
    model: str
    runtime: str
    version: str | None
    queue: int
    running: int
    slots: int
    context: int


class Health(BaseModel):
    code: int
    message: str
    data: HealthData


class Version(BaseModel):
    version: str
    runtime: str
    edgepack: str


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["edgepack"] = "edgepack"
    root: str
    max_model_len: int
    chat_template: Literal["model", "none: plain"]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: Sequence[Model]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    prompt: str
