"""An HTTP server that speaks OpenAI's API, and a conversation in the terminal. Both run one model in this process."""
