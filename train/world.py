"""The closed world that st3-tiny knows: its objects, places and colours.

Emoji names are derived from the Unicode character names, cut down to one word
(CAT FACE -> cat).  The letters leave out ``a`` and ``i``, which are words too.
"""

EMOJI: dict[str, str] = {
    # animals
    "cat": "\U0001f431", "lion": "\U0001f981", "tiger": "\U0001f42f", "cow": "\U0001f42e",
    "pig": "\U0001f437", "frog": "\U0001f438", "panda": "\U0001f43c", "koala": "\U0001f428",
    "fox": "\U0001f98a", "monkey": "\U0001f412", "unicorn": "\U0001f984",
    "elephant": "\U0001f418", "penguin": "\U0001f427", "owl": "\U0001f989",
    "turtle": "\U0001f422", "snake": "\U0001f40d", "whale": "\U0001f433", "octopus": "\U0001f419",
    "crab": "\U0001f980", "snail": "\U0001f40c", "butterfly": "\U0001f98b", "spider": "\U0001f577",
    # plants and food
    "banana": "\U0001f34c", "pineapple": "\U0001f34d", "avocado": "\U0001f951",
    "watermelon": "\U0001f349", "strawberry": "\U0001f353", "bread": "\U0001f35e",
    "lemon": "\U0001f34b", "pear": "\U0001f350", "apple": "\U0001f34e", "carrot": "\U0001f955",
    "mushroom": "\U0001f344", "pizza": "\U0001f355", "hamburger": "\U0001f354",
    "doughnut": "\U0001f369", "cactus": "\U0001f335", "sunflower": "\U0001f33b",
    "tulip": "\U0001f337",
    # vehicles
    "rocket": "\U0001f680", "bicycle": "\U0001f6b2", "tractor": "\U0001f69c",
    "automobile": "\U0001f697", "helicopter": "\U0001f681", "sailboat": "\u26f5",
    # things
    "umbrella": "\u2614", "guitar": "\U0001f3b8", "trumpet": "\U0001f3ba", "key": "\U0001f511",
    "bell": "\U0001f514", "balloon": "\U0001f388", "anchor": "\u2693", "house": "\U0001f3e0",
    "drum": "\U0001f941", "hammer": "\U0001f528", "crown": "\U0001f451", "star": "\u2b50",
    "camera": "\U0001f4f7", "trophy": "\U0001f3c6", "basketball": "\U0001f3c0",
    "snowman": "\u26c4", "candle": "\U0001f56f",
}  # fmt: skip
DIGITS = tuple("0123456789")
LETTERS = tuple("befhkmrstwxz")
NAMES = (*EMOJI, *DIGITS, *LETTERS)

# Cells of the 3 x 3 layout in reading order.
PLACES = (
    "top left", "top centre", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = ("small", "large")

RGB = tuple[int, int, int]
BACKGROUNDS: dict[str, RGB] = {
    "white": (248, 248, 248),
    "gray": (165, 165, 165),
    "blue": (150, 185, 240),
    "green": (160, 215, 160),
    "pink": (245, 175, 205),
    "yellow": (245, 230, 135),
}
INKS: dict[str, RGB] = {
    "red": (210, 30, 30),
    "blue": (30, 60, 200),
    "green": (15, 120, 40),
    "purple": (130, 40, 160),
    "orange": (240, 120, 0),
    "black": (20, 20, 20),
}
