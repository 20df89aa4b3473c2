"""What every program of this kind needs, and no one comes to read.

weights.py   model directories <-> config fields and named tensors; reading JSON, writing files safely
text.py      tokenizers, prompt templates, text <-> ids, batches of ids
records.py   files of examples -> conversations, preference pairs, prompts; its docstring has a sample of every form
demo.py      the demo world: generator and gold score; demo/ holds its files
run.py       what makes a function a command: processes, flags, progress, metrics, checkpoints, exit codes
page.html    the web page of serve.py
"""
