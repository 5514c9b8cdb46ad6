"""Plain text."""

from capibara_flow.domain.parsed import Parsed, plain_blocks
from capibara_flow.engines.parsing.decoding import decoded
from capibara_flow.engines.parsing.media import TEXT


def parse(data: bytes, declared: str | None = None) -> Parsed:
    """*data* as text; its title is its first heading, if it begins with one."""
    text = decoded(data, declared)
    blocks = plain_blocks(text)
    return Parsed(text, blocks, blocks[0].title if blocks else "", media_type=TEXT)
