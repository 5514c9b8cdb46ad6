"""What clients send: the native body is strict, the OpenAI dialect tolerates what it does not know."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from topics.chat import ChatMessage, ChatRequest, Count, FunctionCall, ImagePart, ImageUrl, Priority, Sampling, Seed, TextPart, ToolCall
from topics.knowledge import DEFAULT_COLLECTION, Collection


class ChatBody(BaseModel):
    """``POST /api/chat``: a *message*, or all *messages* of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    message: str | None = Field(default=None, description="A single question")
    messages: tuple[ChatMessage, ...] | None = Field(default=None, description="A whole conversation, oldest first")
    model: str | None = Field(default=None, description="An expert's name or alias; left out or `auto`, the router chooses")
    stream: bool = Field(default=True, description="Server-sent events, or one JSON object")
    background: bool = Field(default=False, description="A streamed answer is made to its end even if nobody reads it")
    timeout_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="The answer ends by then, counted from now; less than the server's own limit"
    )
    priority: Priority = Field(default="normal", description="Which of your own questions go first while several wait")
    sampling: Sampling = Sampling()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    grounded: bool | None = Field(
        default=None, description="Whether the answer rests on documents; left out or `null`, it does where the router finds that useful"
    )
    collection: Collection = Field(default=DEFAULT_COLLECTION, description="The documents that it may rest on")

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if (self.message is None) == (self.messages is None):
            raise ValueError("give either 'message' or 'messages'")
        if not any(message.text.strip() or message.has_image for message in self.conversation if message.role != "assistant"):
            raise ValueError("the message is empty")
        return self

    @property
    def conversation(self) -> tuple[ChatMessage, ...]:
        """The messages, however they were given."""
        if self.messages is not None:
            return self.messages
        return (ChatMessage(role="user", content=self.message),)

    def request(self) -> ChatRequest:
        """The dialect-free request."""
        return ChatRequest(
            messages=self.conversation,
            model=self.model,
            sampling=self.sampling,
            tools=self.tools,
            tool_choice=self.tool_choice,
            response_format=self.response_format,
            grounded=self.grounded,
            collection=self.collection,
        )


class RouteBody(BaseModel):
    """``POST /api/router/test``: a *query*, or all *messages* of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: str | None = Field(default=None, description="A single question")
    messages: tuple[ChatMessage, ...] | None = Field(default=None, min_length=1, description="A whole conversation, oldest first")
    model: str | None = Field(default=None, description="An expert's name or alias; left out or `auto`, the router chooses")

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if (self.query is None) == (self.messages is None):
            raise ValueError("give either 'query' or 'messages'")
        return self

    def request(self) -> ChatRequest:
        """What would be asked."""
        messages = self.messages or (ChatMessage(role="user", content=self.query),)
        return ChatRequest(messages=messages, model=self.model)


class DocumentBody(BaseModel):
    """``POST /api/rag/documents`` in JSON: a *text* and what it is called."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(min_length=1, description="All of it; Markdown when the name ends in .md, say")
    title: str | None = Field(default=None, max_length=1024)
    address: str | None = Field(default=None, max_length=4096, description="Where it comes from; the same address again replaces it")
    name: str | None = Field(default=None, max_length=1024, description="A file's name")


class SearchBody(BaseModel):
    """``POST /api/rag/search``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)] = Field(
        description="What to look for, in any language"
    )
    collection: Collection = DEFAULT_COLLECTION
    limit: int = Field(default=10, ge=1, le=100, description="At most so many sources")


class _Tolerant(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class OpenAIText(TextPart, extra="ignore"):
    """Text, with whatever else a client hangs on it."""


class OpenAIImageUrl(ImageUrl, extra="ignore"):
    """The address of an image."""


class OpenAIImage(ImagePart, extra="ignore"):
    """An image."""

    image_url: OpenAIImageUrl


class OpenAIFunction(FunctionCall, extra="ignore"):
    """What was called."""


class OpenAICall(ToolCall, extra="ignore"):
    """A tool call as a client collected it; streamed ones often keep their ``index``."""

    function: OpenAIFunction


OpenAIPart = Annotated[OpenAIText | OpenAIImage, Field(discriminator="type")]


class OpenAIMessage(_Tolerant):
    """A message as OpenAI's clients send it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[OpenAIPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[OpenAICall, ...] | None = None
    tool_call_id: str | None = None

    def message(self) -> ChatMessage:
        """The same in our roles: a developer's word is a system message."""
        return ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=self.content,
            name=self.name,
            tool_calls=self.tool_calls or (),
            tool_call_id=self.tool_call_id,
        )


class StreamOptions(_Tolerant):
    """Options of a streamed completion."""

    include_usage: bool | None = False


class CompletionBody(_Tolerant):
    """``POST /v1/chat/completions``."""

    messages: tuple[OpenAIMessage, ...] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    priority: Priority | None = Field(default=None, description="Capibara's own: which of your own questions go first while several wait")
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = Field(default=None, description="Not offered yet: true is refused")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Count | None = Field(default=None, ge=-1)
    max_tokens: Count | None = Field(default=None, ge=1)
    max_completion_tokens: Count | None = Field(default=None, ge=1)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    repeat_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: Seed | None = None
    stop: str | Annotated[tuple[str, ...], Field(max_length=16)] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        messages = [each.message() for each in self.messages]
        if not any(each.text.strip() or each.has_image for each in messages if each.role != "assistant"):
            raise ValueError("messages: they are all empty")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed completion ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def request(self) -> ChatRequest:
        """The dialect-free request."""
        return ChatRequest(
            messages=tuple(each.message() for each in self.messages),
            model=self.model,
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_tokens=self.max_completion_tokens or self.max_tokens,
                repeat_penalty=self.repeat_penalty or self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                seed=self.seed,
                stop=(self.stop,) if isinstance(self.stop, str) else self.stop or (),
            ),
            tools=self.tools or (),
            tool_choice=self.tool_choice,
            response_format=self.response_format,
        )
