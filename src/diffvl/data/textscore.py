"""How well an answer matches the true one, as text."""


def is_exact(given: str, truth: str) -> bool:
    """Tells whether two texts are equal up to white space."""
    return " ".join(given.split()) == " ".join(truth.split())


def edit_similarity(given: str, truth: str) -> float:
    """Computes 1 - Levenshtein distance / length of the longer text, in characters; 1 for two empty texts."""
    longest = max(len(given), len(truth))
    if longest == 0:
        return 1.0
    previous = list(range(len(truth) + 1))
    for row, letter in enumerate(given, 1):
        current = [row]
        for column, other in enumerate(truth, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (letter != other)))
        previous = current
    return 1.0 - previous[-1] / longest
