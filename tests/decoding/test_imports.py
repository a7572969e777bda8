import subprocess
import sys

FORBIDDEN = ("transformers", "vllm", "fastapi", "starlette", "uvicorn", "httpx", "tokenizers")


def test_importing_decoding_loads_no_web_vllm_or_transformers_module():
    code = (
        "import sys, decoding\n"
        f"print([name for name in {FORBIDDEN!r} if name in sys.modules])\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'models', 'serve'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
