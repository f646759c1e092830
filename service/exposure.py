"""How the API may be reached from other machines: over TLS, or in clear only where somebody said that this is meant."""

from __future__ import annotations

import ssl
from pathlib import Path

from scheduler.errors import UserError
from service.settings import Settings


def check_exposure(settings: Settings) -> None:
    """Raise UserError where keys would travel in clear over a network, or where the certificate cannot be used."""
    if settings.is_exposed:
        message = f"On {settings.host} other machines reach the API, and their keys would travel in clear."
        remedy = (
            "Set D2FT_TLS_CERT and D2FT_TLS_KEY; or D2FT_PLAIN_HTTP=true where a proxy in front does the TLS or the "
            "network is trusted; or stay on 127.0.0.1."
        )
        raise UserError(message, code="exposed", param="host", remedy=remedy)
    if settings.tls_cert and settings.tls_key:
        _check_certificate(settings.tls_cert, settings.tls_key)


def trust_of(cert: str | None) -> ssl.SSLContext | bool:
    """Whom a probe of our own server trusts: the very certificate that it was given, whatever name that is for."""
    if cert is None:
        return True
    context = ssl.create_default_context(cafile=cert)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be its own authority
    return context


def _check_certificate(cert: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        message = f"The certificate {cert} with the key {key} cannot be used: {reason}."
        remedy = "Give both as PEM, the key without a passphrase and readable by this user."
        raise UserError(message, code="bad_certificate", param="tls_cert", remedy=remedy) from None
