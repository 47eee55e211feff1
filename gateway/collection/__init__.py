"""Collection: answers that are kept to learn from, where the operator has turned it on with `--collect`.

Routes offer finished answers; a thread redacts them in a process of its own and appends them to files. A request waits
for nothing of it.
"""
