"""The words of the synthetic payments: kinds of merchants and messages, each with wordings for training and new ones.

A kind has an effect on the log-odds of fraud. The new wordings say the same in other words; no training record has
them. Braces are filled at random.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhraseKind:
    """known: wordings of the training records. new: wordings of the test records that check new words."""

    effect: float
    weight: float
    known: tuple[str, ...]
    new: tuple[str, ...]


MERCHANTS = {
    "food": PhraseKind(
        -0.8,
        6,
        ("corner grocery store", "village bakery", "supermarket {city}", "butcher and deli", "fruit market {city}"),
        ("organic food hall", "cheese dairy shop", "wholesale greengrocer", "pasta restaurant {city}"),
    ),
    "transport": PhraseKind(
        -0.6,
        4,
        ("petrol station {city}", "city bus tickets", "railway tickets", "airport taxi {city}"),
        ("motorway fuel stop", "tram day pass", "bicycle rental {city}"),
    ),
    "health": PhraseKind(
        -0.8,
        3,
        ("pharmacy {city}", "dental practice", "optician {city}"),
        ("chemist's shop", "physiotherapy clinic", "hearing aid store"),
    ),
    "home": PhraseKind(
        -0.3,
        3,
        ("furniture store", "hardware store {city}", "garden centre", "electricity company"),
        ("kitchen outfitters", "paint and tools market", "water utility {city}"),
    ),
    "electronics": PhraseKind(
        0.7,
        3,
        ("mobile phone shop", "computer store online", "camera dealer {city}"),
        ("laptop outlet", "smartphone marketplace", "video game console shop"),
    ),
    "jewellery": PhraseKind(
        0.8,
        2,
        ("jeweller {city}", "gold and watches", "diamond rings online"),
        ("luxury wristwatch boutique", "silver necklace shop", "bullion coins dealer"),
    ),
    "vouchers": PhraseKind(
        1.2,
        2,
        ("gift card shop", "prepaid voucher kiosk", "game credit online"),
        ("digital coupon codes store", "prepaid card top-up", "in-game currency seller"),
    ),
    "transfer": PhraseKind(
        1.1,
        2,
        ("money transfer service", "crypto exchange", "cash remittance office {city}"),
        ("bitcoin trading platform", "international wire agent", "digital wallet top-up"),
    ),
}

MESSAGES = {
    "none": PhraseKind(0.0, 30, ("",), ("",)),
    "rent": PhraseKind(
        -0.5,
        12,
        ("rent for {month}", "flat deposit {name}", "{month} rent and heating"),
        ("monthly housing payment", "apartment lease {month}", "utilities share {name}"),
    ),
    "people": PhraseKind(
        -0.3,
        14,
        (
            "dinner with {name}",
            "birthday present for {name}",
            "gift cards for the office party",
            "lunch, thanks {name}",
        ),
        ("wedding present {name}", "my half of the pizza", "flowers for grandma", "voucher for {name}'s anniversary"),
    ),
    "invoice": PhraseKind(
        -0.3,
        12,
        ("invoice {number}", "order {number} as agreed", "customer {number} {month} bill"),
        ("bill no. {number}", "settlement of account {number}", "repair of the heating, receipt {number}"),
    ),
    "learning": PhraseKind(
        -0.5,
        6,
        ("school fees {name}", "piano lessons {month}", "language course {month}"),
        ("kindergarten contribution", "driving lessons {name}", "university semester fee"),
    ),
    "bank scam": PhraseKind(
        3.2,
        2.2,
        (
            "move to safe account as the bank told me",
            "security department asked to protect my savings",
            "account verification, do it now",
        ),
        (
            "officer said my money is in danger",
            "transfer everything before the account is blocked",
            "confirm identity to avoid suspension",
        ),
    ),
    "prize scam": PhraseKind(
        3.2,
        2.0,
        ("fee to receive the lottery prize", "release fee for parcel at customs", "tax for inheritance from abroad"),
        (
            "processing charge for my sweepstake winnings",
            "unlock shipment, pay today",
            "lawyer costs for unknown uncle's will",
        ),
    ),
    "boss scam": PhraseKind(
        3.0,
        1.6,
        (
            "gift card codes for the director, urgent",
            "confidential payment requested by CEO",
            "boss needs vouchers immediately",
        ),
        (
            "chief asked by text to buy cards quickly",
            "secret acquisition, tell nobody",
            "manager wants codes right away",
        ),
    ),
    "romance scam": PhraseKind(
        2.8,
        1.6,
        (
            "plane ticket so that we can meet at last, my love",
            "hospital bill for my online fiance",
            "visa for my darling soldier",
        ),
        (
            "help for sweetheart I met on the internet",
            "he cannot leave the oil rig without this",
            "passport fee for my dear doctor",
        ),
    ),
    "investment scam": PhraseKind(
        3.0,
        1.6,
        (
            "guaranteed profit crypto plan",
            "double your money in a week, last chance",
            "trading expert's starter package",
        ),
        ("risk-free returns of 300 percent", "broker promises daily gains", "exclusive coin presale closes tonight"),
    ),
}
FILLERS = {
    "city": ("Lyon", "Cologne", "Malmo", "Turin", "Seville", "Gdansk", "Graz"),
    "name": ("Anna", "Piotr", "Luis", "Maja", "Jonas", "Giulia", "Omar"),
    "month": ("January", "March", "May", "June", "September", "November"),
}
