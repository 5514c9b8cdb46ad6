"""Which language a text is in, by py3langid."""

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

#: Letters that are needed to tell at all, how many are looked at, and how sure it has to be.
_LETTERS, _LOOK, _SURE = 20, 3000, 0.6


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> str:
    """The ISO 639-1 code of the language that *text* is in, or empty."""
    sample = text if len(text) <= 2 * _LOOK else f"{text[:_LOOK]} {text[len(text) // 2 : len(text) // 2 + _LOOK]}"
    if sum(each.isalpha() for each in sample) < _LETTERS:
        return ""
    language, probability = _identifier().classify(sample)
    return str(language) if probability >= _SURE else ""
