"""From an expert's settings to the engine that serves it."""

from functools import partial

from capibara_flow.domain.fleet import Expert
from capibara_flow.engines.llama_completion import LlamaCompletion
from capibara_flow.engines.ollama import OllamaChat
from capibara_flow.engines.openai_chat import OpenAIChat
from capibara_flow.engines.pool import Pool
from capibara_flow.ports import ChatEngine


def build_engine(expert: Expert, url: str) -> ChatEngine:
    """The engine for the expert's dialect at one address; raises ``SettingsError`` for an unknown template."""
    match expert.dialect:
        case "llama_completion":
            return LlamaCompletion(expert, url)
        case "ollama":
            return OllamaChat(expert, url)
        case "openai" | "llama_server" | "vllm":
            return OpenAIChat(expert, url)


def build_expert(expert: Expert) -> Pool:
    """The engine for all addresses of *expert*; raises ``SettingsError`` for an unknown template, ``ValueError`` if it has no address."""
    return Pool(expert.name, expert.urls, partial(build_engine, expert))
