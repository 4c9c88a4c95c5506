"""The words that scenes print: common, short, lower case, none of them a shape or a color."""

import random

_LIST = """
air apple arm art baby back bag ball band bank barn base bath beach bean bear bed bee bell belt
bench bike bird boat body bone book boot bowl box boy brain bread brick bridge brush bus cake
calf camel camp candy cap car card cat cave chair chalk child city clay clock cloth cloud coat
coffee coin cook corn cow crab cream crow crown cup dance dark day deer desk dish dog doll door
dream dress drum duck dust eagle ear earth east egg exit eye face fan farm feet fence field fire
fish flag flame floor flower fly food foot fork forest fox frog fruit game garden gate ghost
gift girl glass glove goat gold grape grass guitar hair hall ham hand hat hello help hen hill
home honey hook horse hotel house ice island jacket jam jar jelly juice jump key king kite knee
knife lake lamb lamp land leaf leg lemon letter lid life light lion lip lock love lunch magic
mail map market mask meal meat melon milk mint money monkey mouse mouth mud music nail name neck
nest net night north nose note nurse oak ocean office oil onion open oven owl page paint pan
paper park party path peach pear pen pencil piano picnic pie pig pilot plane plant plate pond
pony pool post pot potato prize puppy queen quiet rabbit race radio rain rat rice river road
robot rock roof room rope rug ruler sail salt sand scarf school sea seed shade sheep shell ship
shirt shoe shop sink skate ski skin sky sled sleep smile smoke snail snake snow soap sock sofa
song soup south spider spoon spring stone stop store storm street sugar summer sun swan table
tail taxi tea tent tiger time toast toe tooth tower town toy train tray tree truck tulip turtle
valley van vase violin voice wagon wall watch water wave west whale wheat wheel wind window wine
wing winter wolf wood wool world yard zebra zoo
"""
WORDS = tuple(_LIST.split())

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


def invented_word(rng: random.Random) -> str:
    """Return an invented word of three to six letters, so that the model learns to read letters."""
    letters = rng.randrange(3, 7)
    starts_with_vowel = rng.randrange(2)
    return "".join(
        rng.choice(_VOWELS if (place + starts_with_vowel) % 2 else _CONSONANTS)
        for place in range(letters)
    )
