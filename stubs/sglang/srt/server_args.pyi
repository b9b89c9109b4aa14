class ServerArgs:
    model_path: str

def prepare_server_args(argv: list[str]) -> ServerArgs: ...
