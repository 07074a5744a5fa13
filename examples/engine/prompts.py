"""Eight prompts of different lengths, for the demo and the tests."""

PROMPTS = (
    "Hi!",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List five fruits.",
    "Who wrote Hamlet?",
    "Explain in three sentences why the sky is blue during the day and red at sunset.",
    "I have three apples and buy two bags with four apples in each. On the way home I eat one apple and give two to a"
    " friend. How many apples are left? Think step by step.",
    "Summarise this text in one sentence. A language model keeps the keys and values of every token it has read, so"
    " that it need not read them again for each new token. For many conversations at once this cache grows large,"
    " and nobody knows beforehand how long each of them will become. So the cache is cut into pages of a fixed size,"
    " as an operating system cuts memory. A conversation takes a page when it needs one and returns all of them when"
    " it ends. Its pages may lie anywhere, so attention follows a table from the position of a token to the page"
    " where its keys and values lie. No memory is lost to gaps, and two conversations that begin with the same words"
    " can share the pages of these words.",
)
