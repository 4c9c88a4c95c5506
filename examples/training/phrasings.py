"""Phrasings of questions, and the names of places and numbers in answers."""

ORDINALS = ("first", "second")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THE_DIFFERENCE = "What's the difference between these two images?"

AT = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
ASKED_AT = (
    ("at the top left", "in the top left corner", "in the upper left corner", "in the top left"),
    ("at the top", "at the top of the image", "in the top middle"),
    (
        "at the top right",
        "in the top right corner",
        "in the upper right corner",
        "in the top right",
    ),
    ("on the left", "on the left side", "at the left"),
    ("in the middle", "in the center", "in the middle of the image", "in the center of the image"),
    ("on the right", "on the right side", "at the right"),
    (
        "at the bottom left",
        "in the bottom left corner",
        "in the lower left corner",
        "in the bottom left",
    ),
    ("at the bottom", "at the bottom of the image", "in the bottom middle"),
    (
        "at the bottom right",
        "in the bottom right corner",
        "in the lower right corner",
        "in the bottom right",
    ),
)

HOW_MANY = (
    "How many {} are there?",
    "How many {} are in the image?",
    "How many {} are in this image?",
    "How many {} can you see?",
    "How many {} do you see?",
    "How many {} are shown?",
    "Count the {}.",
)
WHAT_COLOR = (
    "What color is the {}?",
    "What color is the {}?",
    "What is the color of the {}?",
    "What's the color of the {}?",
    "Which color is the {}?",
    "Which color does the {} have?",
    "Tell me the color of the {}.",
)
WHERE = (
    "Where is the {}?",
    "Where is the {}?",
    "Where's the {}?",
    "Where is the {} in the image?",
    "Where can I find the {}?",
    "Where do you see the {}?",
    "In which part of the image is the {}?",
)
WHAT_AT = (
    "What is {}?",
    "What's {}?",
    "What is there {}?",
    "What do you see {}?",
    "What can you see {}?",
    "What is shown {}?",
)
WHICH_SHAPE_AT = (
    "Which shape is {}?",
    "What shape is {}?",
    "Which object is {}?",
    "What object is {}?",
)
WHAT_IS_WRITTEN = (
    "What is written?",
    "What is written in the image?",
    "What does it say?",
    "What does the image say?",
    "What text is in the image?",
    "Read the text.",
)
WHAT_NUMBER = (
    "What number is written?",
    "What number is shown?",
    "What number is this?",
    "What is the number?",
    "What's the number?",
    "What number do you see?",
    "What number is in the image?",
    "Which number is written in the image?",
    "Which number is it?",
    "Read the number.",
)
WHAT_WORD = (
    "What word is written?",
    "What word is shown?",
    "What word is this?",
    "What is the word?",
    "What's the word?",
    "What word do you see?",
    "What word is in the image?",
    "Which word is written in the image?",
    "Which word is it?",
    "Read the word.",
)
DESCRIBE = (
    "Describe the image.",
    "Describe this image.",
    "Describe this picture.",
    "Describe what you see.",
    "Can you describe the image?",
    "What is in this image?",
    "What is in the image?",
    "What's in this image?",
    "What do you see?",
    "What do you see in this image?",
    "What does the image show?",
    "What does this image show?",
    "What is shown in the image?",
    "What is this?",
)
IS_THERE = (
    "Is there {}?",
    "Is there {} in the image?",
    "Is there {} in this image?",
    "Can you see {}?",
    "Do you see {}?",
    "Does the image show {}?",
)
LARGEST = (
    "Which shape is the largest?",
    "Which shape is the biggest?",
    "What is the largest shape?",
    "What is the biggest shape?",
    "What's the biggest shape?",
)
SMALLEST = (
    "Which shape is the smallest?",
    "What is the smallest shape?",
    "What's the smallest shape?",
)
DIFFERENCE = (
    "What is the difference between these two images?",
    "What's the difference between the two images?",
    "What is the difference between the images?",
    "What is different between these images?",
    "What is different?",
    "What's different?",
    "What changed?",
    "What changed between the two images?",
    "How do these images differ?",
    "How do the two images differ?",
    "Compare these two images.",
    "Compare the images.",
    "Find the difference.",
)
WHICH_IMAGE = (
    "Which image shows {}?",
    "Which image has {}?",
    "In which image is {}?",
    "Which of the images shows {}?",
)
SAME = (
    "Are these two images the same?",
    "Are the two images the same?",
    "Are these images identical?",
    "Are they the same?",
    "Is it the same image?",
)
