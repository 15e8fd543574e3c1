"""Trains teachers, distils them into students, samples and measures both: every command is a module here (potstill.__main__)."""

if __name__ == "engine":  # the short name in a checkout
    from potstill._short_names import share

    share(__name__)
