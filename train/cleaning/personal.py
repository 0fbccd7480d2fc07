"""Personal data and secrets in a text, each replaced by its kind in brackets: `[EMAIL]`, `[PHONE]`, `[KEY]`..."""

import functools
import re
from collections.abc import Callable

# Not an address: `git@host:path` of Git, `icon@2x.png` of web pages.
EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]+\.)+(?!(?:png|jpe?g|gif|svg|webp)\b)[^\W\d_]{2,24}(?![\w-]|\.\w|:[\w~/])"
)
KEY = re.compile(
    r"""-----BEGIN[ ](?:[A-Z0-9]+[ ])*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----.*?
        (?:-----END[ ](?:[A-Z0-9]+[ ])*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----|\Z)
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                                         # AWS: the id, and by its name the secret
    | (?P<name>\b(?i:aws_?secret_?(?:access_?)?key)[\"']?\s*[:=]\s*[\"']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])
    | \b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255})   # GitHub
    | \bglpat-[\w-]{20,}                                                    # GitLab
    | \bsk-(?:(?:ant|proj|svcacct|admin|or-v1)-[\w-]{20,}|[A-Za-z0-9]{20,}) # OpenAI, Anthropic, OpenRouter
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,} | \bxapp-[\w-]{20,}                  # Slack
    | https://hooks\.slack\.com/services/[\w/]{20,}
    | \bAIza[\w-]{35} | \bya29\.[\w-]{20,}                                  # Google
    | \b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}                                # Stripe
    | \bhf_[A-Za-z0-9]{30,} | \bnpm_[A-Za-z0-9]{36} | \bpypi-[\w-]{50,}     # Hugging Face, npm, PyPI
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}                            # JSON web token
    """,
    re.VERBOSE | re.DOTALL,
)
# In one piece, or in the groups that are printed on cards: an amount minus an amount is none.
CARD = re.compile(
    r"(?<![\w.+-])[2-6](?:\d{12,18}|\d{3}(?P<by>[ -])(?:(?:\d{4}(?P=by)){2}\d{1,4}|\d{6}(?P=by)\d{4,5}))(?![\w-]|\.\d)"
)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]){11,30}\b")
SHORTEST_IBAN = 15
PHONE = re.compile(r"\+\d|\d{2}[\d ().-]{4,}\d")  # what phonenumbers need not be asked without
DIGITS = re.compile(r"\d+")


@functools.cache
def masking(kinds: tuple[str, ...], region: str) -> Callable[[str], str]:
    """A function that masks `kinds` in a text; phone numbers without a country code are read as those of `region`."""
    masks: dict[str, Callable[[str], str]] = {
        "key": lambda text: KEY.sub(lambda match: f"{match['name'] or ''}[KEY]", text),
        "email": lambda text: EMAIL.sub("[EMAIL]", text),
        "iban": lambda text: IBAN.sub(_iban, text),
        "card": lambda text: CARD.sub(_card, text),
        "phone": lambda text: _phone(text, region),
    }

    def mask(text: str) -> str:
        for kind, masked in masks.items():  # in this order: a key or an IBAN has digits like a card or a phone
            text = masked(text) if kind in kinds else text
        return text

    return mask


def _iban(match: re.Match[str]) -> str:
    """Masked is the longest beginning with right check digits; capitals may follow it."""
    from stdnum import iban

    found = match[0]
    for end in range(len(found), SHORTEST_IBAN - 1, -1):
        if found[end - 1] != " " and iban.is_valid(found[:end], check_country=False):
            return "[IBAN]" + found[end:]
    return found


def _card(match: re.Match[str]) -> str:
    from stdnum import luhn

    return "[CARD]" if luhn.is_valid("".join(DIGITS.findall(match[0]))) else match[0]


def _phone(text: str, region: str) -> str:
    """Masked are numbers with a country code, and those that are grouped as in `region`; bare digits stay."""
    if not PHONE.search(text):
        return text
    from phonenumbers import Leniency, PhoneNumberFormat, PhoneNumberMatcher, ValidationResult, format_number
    from phonenumbers import is_possible_number_with_reason as possibility

    pieces, end = [], 0
    for match in PhoneNumberMatcher(text, region, leniency=Leniency.POSSIBLE, max_tries=len(text)):
        groups = DIGITS.findall(match.raw_string)
        national = DIGITS.findall(format_number(match.number, PhoneNumberFormat.NATIONAL))
        international = match.raw_string.startswith("+") and not text[: match.start][-1:].isalnum()  # no sum
        grouped = len(groups) > 1 and groups[-len(national) :] == national
        if (international or grouped) and possibility(match.number) == ValidationResult.IS_POSSIBLE:
            pieces += [text[end : match.start], "[PHONE]"]
            end = match.end
    return "".join(pieces) + text[end:]
