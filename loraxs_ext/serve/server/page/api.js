// Calls to the server that this page came from. Paths are relative, so that a proxy may put it under a prefix.

let key = ""; // In memory only: it is gone when the page is.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(value) {
  key = value;
}

export async function getJson(path, signal) {
  return (await call(path, { signal })).json();
}

/** The events of a streamed answer, parsed; ends after the server's [DONE]. */
export async function* stream(path, body, signal) {
  const response = await call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(response.status, sentence(event) ?? "The server failed.");
    yield event;
  }
  throw new ApiError(response.status, "The connection closed in the middle of the answer.");
}

async function call(path, options) {
  if (!/^[!-~]*$/.test(key)) throw new ApiError(401, "An API key has neither spaces nor letters beyond ASCII.");
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
    // What fetch says of a refused connection differs from browser to browser and helps nobody.
    throw new ApiError(0, "The server does not answer.");
  }
  if (!response.ok) throw new ApiError(response.status, await refusal(response));
  return response;
}

async function refusal(response) {
  if (response.status === 401) return key ? "The server refuses this API key." : "The server asks for an API key.";
  const text = await response.text();
  try {
    return sentence(JSON.parse(text)) ?? `The server answered ${response.status}.`;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

/** What an error says in words: OpenAI's {"error": {"message"}} or FastAPI's {"detail"}. */
function sentence(body) {
  const said = body?.error?.message ?? body?.error ?? body?.detail;
  return typeof said === "string" ? said : undefined;
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
