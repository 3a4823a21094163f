"""Why a connection to a NATS server did not come about, in one sentence that says what to do."""

from __future__ import annotations

import ssl

from nats.errors import Error as ClientError

from bus.credentials import ConnectionOptions


class NotTrusted(ClientError):
    """The server offers no protected line, and this side was told to use no other one."""


def is_refusal(error: BaseException) -> bool:
    """Whether the server, or what is known of it, says no: asking again as the same one is no use."""
    return isinstance(error, ssl.SSLError | NotTrusted) or _is_about_credentials(str(error))


def _is_about_credentials(text: str) -> bool:
    return "authorization" in text.lower() or "authentication" in text.lower()


def why_not(url: str, errors: list[BaseException], options: ConnectionOptions) -> str:
    """One sentence for a connection that did not come about."""
    error = next((one for one in reversed(errors) if is_refusal(one)), None)
    text = str(error).lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        if "expired" in text:
            return f"the certificate of the NATS server at {url} has expired: have it renewed"
        if "mismatch" in text:
            return (
                f"the certificate of the NATS server at {url} is not for this address ({error.verify_message}): use "
                "the name that stands in it"
            )
        known = f"the authority in {options.ca}" if options.ca else "an authority that is known here"
        return (
            f"the certificate of the NATS server at {url} does not come from {known}: name the file of the right "
            "authority with --nats-ca FILE"
        )
    if isinstance(error, NotTrusted):
        return f"the NATS server at {url} offers no TLS, and this side was told to use it: check both configurations"
    if isinstance(error, ssl.SSLError):
        if "required" in text or not options.cert:
            return (
                f"the NATS server at {url} wants a certificate from this side: give --nats-cert FILE and "
                f"--nats-key FILE ({error.reason})"
            )
        why = "has expired" if "expired" in text else "comes from no authority that it knows, or is not valid"
        return f"the NATS server at {url} does not take the certificate {options.cert}: it {why} ({error.reason})"
    if error is not None:
        return _refused(url, text, options)
    named = [str(one) for one in errors if str(one).startswith("nats: '")]
    if named:
        return f"the NATS server at {url} refuses the connection: {named[-1].removeprefix('nats: ')}"
    return f"no NATS server answers at {url}: start one with `longshore up`, or pass its address with --nats URL"


def _refused(url: str, text: str, options: ConnectionOptions) -> str:
    if options.creds:
        who = f"the credentials in {options.creds}: have new ones made"
    elif options.nkey:
        who = f"the nkey in {options.nkey}: its public key is no user there"
    elif options.token:
        who = "this token"
    elif options.user:
        who = f"user {options.user!r} with this password: check both"
    else:
        return (
            f"the NATS server at {url} wants to know who connects: give --nats-user with --nats-password-file (or "
            "LONGSHORE_NATS_PASSWORD), --nats-nkey or --nats-creds"
        )
    expired = ", because they have expired" if "expired" in text else ""
    return f"the NATS server at {url} refuses {who}{expired}"
