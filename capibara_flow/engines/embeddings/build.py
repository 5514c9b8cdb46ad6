"""From the name of an embedding model to the engine that runs it."""

from typing import TYPE_CHECKING

from capibara_flow.errors import CannotStart
from capibara_flow.ports import Embedder
from capibara_flow.settings import SettingsError

if TYPE_CHECKING:
    from capibara_flow.engines.embeddings.threaded import Model

#: What can be chosen.
NAMES = ("universal", "e5", "minilm", "sentence-transformers:MODEL")


def build_embedder(name: str, *, capacity: int = 0) -> Embedder:
    """The model called *name*, loaded and its weights verified, which takes up to seconds; *capacity* vectors are remembered.

    ``universal`` and ``e5`` know many languages, ``minilm`` knows English; ``sentence-transformers:MODEL`` is any of Hugging Face,
    by name or folder. Raises ``SettingsError`` for an unknown name, ``CannotStart`` when a package is missing or is not the known one:
    the message says what to install.
    """
    try:
        embedder = _threaded(name)
    except ModuleNotFoundError as error:  # numpy, that is: who routes by rules has no use for it
        raise CannotStart(f"the embedding model {name} needs {error.name}: `pip install 'capibara-flow[local]'` brings it") from error
    if not capacity:
        return embedder
    from capibara_flow.engines.embeddings.cached import CachedEmbedder  # noqa: PLC0415  needs numpy

    return CachedEmbedder(embedder, capacity)


def _threaded(name: str) -> Embedder:
    import threadpoolctl  # noqa: PLC0415  needs numpy, as all below

    from capibara_flow.engines.embeddings.threaded import ThreadedEmbedder  # noqa: PLC0415

    # For the whole process: the matrices are small, and on a busy machine threads that wait for each other took five times as long.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    return ThreadedEmbedder(_model(name))


def _model(name: str) -> "Model":
    """Every product is imported here, so that nobody loads what another one needs."""
    match name.partition(":"):
        case "universal", "", "":
            from capibara_flow.engines.embeddings.universal import UniversalSentenceEncoder  # noqa: PLC0415

            return UniversalSentenceEncoder()
        case "e5", "", "":
            from capibara_flow.engines.embeddings.e5 import E5  # noqa: PLC0415

            return E5()
        case "minilm", "", "":
            from capibara_flow.engines.embeddings.minilm import MiniLM  # noqa: PLC0415

            return MiniLM()
        case "sentence-transformers", ":", model if model:
            from capibara_flow.engines.embeddings.sentence_transformers import HuggingFaceModel  # noqa: PLC0415

            return HuggingFaceModel(model)
    raise SettingsError(f"no embedding model is called {name!r}; there are: {', '.join(NAMES)}")
