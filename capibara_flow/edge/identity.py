"""Who asks: a static key stands for its principal, everybody else is known by address."""

import hmac

from aiohttp import web

from capibara_flow.domain import turns
from capibara_flow.errors import Unauthorized
from capibara_flow.ports import Identity
from capibara_flow.settings import AuthSettings

ANONYMOUS = turns.ANONYMOUS


def identify(request: web.Request, auth: AuthSettings) -> Identity:
    """The principal and tenant of *request*; raises ``Unauthorized``."""
    scheme, _, presented = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and presented:
        for key in auth.keys:
            if hmac.compare_digest(key.key.get_secret_value().encode(), presented.strip().encode(errors="surrogateescape")):
                return Identity(key.principal, key.tenant)
        # Official clients always send some key: where nobody has one, it says nothing.
        if auth.keys or not auth.anonymous:
            raise Unauthorized("this API key is not known here")
    if not auth.anonymous:
        raise Unauthorized("an API key is needed: send it as 'Authorization: Bearer KEY'")
    return Identity(f"{ANONYMOUS}:{request.remote}", ANONYMOUS)
