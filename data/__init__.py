"""What every program of this kind needs, and no one comes to read. A file imports only files above it.

weights.py   model directories <-> config fields and named tensors; reading JSON, writing files safely
text.py      tokenizers, prompt templates, text <-> ids, batches of ids
records.py   files of examples -> conversations, preference pairs, prompts
measure.py   how good answers are: best-of-n, win rate, distinct-n; how well a run goes
demo.py      the demo world: generator and gold score; demo/ holds its files
run.py       what makes a function a command: processes, flags, progress, metrics, checkpoints, exit codes
rules.py     functions that give rewards, run in a process that can be ended
page.html    the web page of serve.py

The shapes of records: the docstring of records.py has a sample of every form that a file may have, read_records says
what they become, and encode_example and encode_preference in text.py say what the ids of a record are.
"""
