"""Who is signed in on a page: a cookie that names an API key by its id, signed, for half a day.

The key itself is never in it: browsers send a cookie to every port of a host, and what listens there is not all ours.
A cookie is worth no more than its key, and ends with it.
"""

from __future__ import annotations

import hashlib
from http.cookies import CookieError, SimpleCookie

from itsdangerous import BadData, URLSafeTimedSerializer

COOKIE = "d2ft_session"
AGE_S = 12 * 3600


class Sessions:
    """Makes and reads the cookies of one service; `secret` is the one that its other secrets follow from."""

    def __init__(self, secret: str) -> None:
        self._seal = URLSafeTimedSerializer(
            secret, salt="d2ft.session", signer_kwargs={"digest_method": hashlib.sha256, "key_derivation": "hmac"}
        )

    def cookie_of(self, key_id: str) -> str:
        """The value of a cookie for the holder of this key."""
        return self._seal.dumps(key_id)

    def key_id(self, header: str) -> str | None:
        """The key's id in a Cookie header; None where it has no cookie of ours, or one too old or not made here."""
        try:
            given = SimpleCookie(header).get(COOKIE)
            found = self._seal.loads(given.value, max_age=AGE_S) if given else None
        except (BadData, CookieError):
            return None
        return found if isinstance(found, str) else None
