/** Every text of the page, in its two languages, and the language in use. */

const TEXTS = {
  es: {
    skip: "Ir a la pregunta",
    new: "Nueva conversación",
    language: "Idioma",
    conversation: "Conversación",
    down: "Ir al final",
    question: "Tu pregunta",
    placeholder: "Pregunta lo que quieras…",
    keys: "Intro envía · Mayús + Intro salta de línea",
    model: "Modelo",
    auto: "automático",
    scripted: "guion",
    scriptedMore: "Este modelo recita un guion: sirve para probar, no para aprender nada.",
    send: "Enviar",
    stop: "Detener",
    you: "Tú:",
    answer: "Respuesta",
    reasoning: "Razonamiento",
    details: "Detalles",
    copy: "Copiar",
    copied: "Copiado",
    welcome: "Con calma. ¿Qué\u00a0quieres\u00a0saber?",
    welcomeMore: "Elijo el modelo que mejor te puede responder y te digo cuál ha sido, por qué y cuánto ha tardado.",
    ideas: ["Explícame la fotosíntesis en tres frases", "Escribe una función que invierta una lista en Python", "Dame ideas para un fin de semana de lluvia"],
    phase: { waiting: "Buscando quién responde…", thinking: "Pensando…", held: "Esperando: {0}", loading: "Cargando {0}…", loadingFor: "Cargando {0}, quedan unos {1}…", queued: "En cola, turno {0}…", queuedFor: "En cola, turno {0}: unos {1}…", reconnecting: "Se cortó la conexión. Reconectando…", stopping: "Deteniendo…" },
    route: "ruta {0}",
    first: "primer token {0}",
    total: "total {0}",
    tokens: { one: "{0} token", other: "{0} tokens" },
    finish: { stop: "completa", length: "cortada: límite de longitud", tool_calls: "pide una herramienta", content_filter: "filtrada", cancelled: "detenida" },
    incomplete: "incompleta",
    tool: "Herramienta {0}",
    fact: {
      requested: "Modelo pedido", route: "Ruta", complexity: "Complejidad", confidence: "Confianza", why: "Por qué", plan: "Plan",
      prompt: "Tokens de la pregunta", burnt: "Tokens descartados", attempts: "Intentos", rate: "Tokens por segundo", resets: "Veces que empezó de nuevo", turn: "Turno",
      first_token_seconds: "Primer token en el modelo", total_seconds: "Total en el modelo",
    },
    complexity: { simple: "sencilla", moderate: "media", complex: "compleja", very_complex: "muy compleja" },
    problem: {
      server: "La respuesta se interrumpió",
      refused: "No se pudo preguntar",
      network: "No hay conexión con el servidor",
      lost: "Se perdió la conexión a mitad de la respuesta",
      unsent: "La pregunta no llegó a enviarse",
      incomplete: "Lo de arriba no es una respuesta completa.",
    },
    titles: {
      "engine busy": "el modelo está ocupado", "engine unreachable": "no se llega al modelo", "engine broke": "el modelo falló a mitad de la respuesta",
      "broker unavailable": "el servicio no está disponible ahora", "queue full": "hay demasiadas preguntas en espera", "bad request": "el modelo no acepta esta pregunta",
      "unknown expert": "ese modelo no existe aquí", "turn expired": "se acabó el tiempo", "turn unknown": "esta respuesta ya no se conserva",
      "turn gone": "esta respuesta ya no se conserva entera",
    },
    documentsOpen: "Documentos: añadir, buscar y quitar",
    documentsTitle: "Documentos",
    close: "Cerrar",
    dropHere: "Elige archivos, o suéltalos aquí",
    dropMore: "Texto, Markdown, HTML, PDF o DOCX. Traer otra vez el mismo no lo duplica.",
    collection: "Colección",
    seek: "Buscar",
    seekWords: "Buscar en los documentos…",
    nothingFound: "No se encontró nada.",
    unrelated: "Nada de esto se relaciona lo bastante con la búsqueda: una respuesta no lo usaría.",
    untitled: "sin título",
    remove: "Quitar",
    removeThis: "Quitar «{0}»",
    removeSure: "¿Seguro? Quitar",
    documents: { one: "{0} documento", other: "{0} documentos" },
    passages: { one: "{0} pasaje", other: "{0} pasajes" },
    sources: { one: "{0} fuente", other: "{0} fuentes" },
    cited: { one: "{0} citada", other: "{0} citadas" },
    passage: "El pasaje",
    score: "afinidad {0}",
    citation: "Fuente {0}",
    unknownCitation: "La respuesta cita la fuente {0}, que no existe",
    unknownCitations: "La respuesta cita números que no son de ninguna fuente: {0}.",
    lacking: "Faltan fuentes: {0}.",
    grounding: "Fuentes",
    groundings: { auto: "fuentes: auto", always: "con fuentes", never: "sin fuentes" },
    upload: {
      waiting: "en espera", sending: "enviando…", taking: "leyendo y ordenando…", created: "añadido", replaced: "actualizado",
      unchanged: "ya estaba, sin cambios", same: "ya estaba con otro nombre",
      refusals: { 409: "se detuvo antes de terminar", 413: "el archivo es demasiado grande", 422: "este archivo no se puede leer" },
    },
    again: "Preguntar otra vez",
    reconnect: "Reconectar",
    said: { done: "Respuesta completa", stopped: "Respuesta detenida", failed: "La respuesta falló" },
  },
  en: {
    skip: "Skip to your question",
    new: "New conversation",
    language: "Language",
    conversation: "Conversation",
    down: "Jump to the end",
    question: "Your question",
    placeholder: "Ask anything…",
    keys: "Enter sends · Shift + Enter for a new line",
    model: "Model",
    auto: "auto",
    scripted: "scripted",
    scriptedMore: "This model recites a script: good for trying things out, not for learning anything.",
    send: "Send",
    stop: "Stop",
    you: "You:",
    answer: "Answer",
    reasoning: "Reasoning",
    details: "Details",
    copy: "Copy",
    copied: "Copied",
    welcome: "Take it easy. What would you like to know?",
    welcomeMore: "I pick the model that can answer you best, and tell you which one it was, why, and how long it took.",
    ideas: ["Explain photosynthesis in three sentences", "Write a Python function that reverses a list", "Give me ideas for a rainy weekend"],
    phase: { waiting: "Finding who answers…", thinking: "Thinking…", held: "Waiting: {0}", loading: "Loading {0}…", loadingFor: "Loading {0}, about {1} left…", queued: "In line, place {0}…", queuedFor: "In line, place {0}: about {1}…", reconnecting: "Connection lost. Reconnecting…", stopping: "Stopping…" },
    route: "route {0}",
    first: "first token {0}",
    total: "total {0}",
    tokens: { one: "{0} token", other: "{0} tokens" },
    finish: { stop: "complete", length: "cut: length limit", tool_calls: "asks for a tool", content_filter: "filtered", cancelled: "stopped" },
    incomplete: "incomplete",
    tool: "Tool {0}",
    fact: {
      requested: "Model asked for", route: "Route", complexity: "Complexity", confidence: "Confidence", why: "Why", plan: "Plan",
      prompt: "Prompt tokens", burnt: "Discarded tokens", attempts: "Attempts", rate: "Tokens per second", resets: "Times it started anew", turn: "Turn",
      first_token_seconds: "First token at the model", total_seconds: "Total at the model",
    },
    complexity: { simple: "simple", moderate: "moderate", complex: "complex", very_complex: "very complex" },
    problem: {
      server: "The answer broke off",
      refused: "The question was refused",
      network: "The server cannot be reached",
      lost: "The connection was lost in mid-answer",
      unsent: "The question was never sent",
      incomplete: "What stands above is not a complete answer.",
    },
    titles: {
      "engine busy": "the model is busy", "engine unreachable": "the model cannot be reached", "engine broke": "the model failed in mid-answer",
      "broker unavailable": "the service is not available now", "queue full": "too many questions are waiting", "bad request": "the model does not accept this question",
      "unknown expert": "there is no such model here", "turn expired": "time ran out", "turn unknown": "this answer is no longer kept",
      "turn gone": "not all of this answer is kept any more",
    },
    documentsOpen: "Documents: add, search and remove",
    documentsTitle: "Documents",
    close: "Close",
    dropHere: "Choose files, or drop them here",
    dropMore: "Text, Markdown, HTML, PDF or DOCX. Bringing the same again does not double it.",
    collection: "Collection",
    seek: "Search",
    seekWords: "Search the documents…",
    nothingFound: "Nothing was found.",
    unrelated: "None of this has enough to do with the search: an answer would not use it.",
    untitled: "untitled",
    remove: "Remove",
    removeThis: "Remove “{0}”",
    removeSure: "Sure? Remove",
    documents: { one: "{0} document", other: "{0} documents" },
    passages: { one: "{0} passage", other: "{0} passages" },
    sources: { one: "{0} source", other: "{0} sources" },
    cited: { one: "{0} cited", other: "{0} cited" },
    passage: "The passage",
    score: "score {0}",
    citation: "Source {0}",
    unknownCitation: "The answer cites source {0}, which does not exist",
    unknownCitations: "The answer cites numbers that no source has: {0}.",
    lacking: "Sources are missing: {0}.",
    grounding: "Sources",
    groundings: { auto: "sources: auto", always: "with sources", never: "without sources" },
    upload: {
      waiting: "waiting", sending: "sending…", taking: "reading and sorting…", created: "added", replaced: "updated",
      unchanged: "was there already, unchanged", same: "was there already under another name",
      refusals: { 409: "it was stopped before its end", 413: "the file is too large", 422: "this file cannot be read" },
    },
    again: "Ask again",
    reconnect: "Reconnect",
    said: { done: "Answer complete", stopped: "Answer stopped", failed: "The answer failed" },
  },
};

const KEY = "capibara.language";
let language = chosen() ?? (/^(es|ca|gl|eu)\b/i.test(navigator.language) ? "es" : "en");

function chosen() {
  try {
    const kept = localStorage.getItem(KEY);
    return kept in TEXTS ? kept : null;
  } catch {
    return null; // storage may be forbidden: the page works without it
  }
}

/** The language in use: "es" or "en". */
export const current = () => language;

/** Change the language and remember it. */
export function choose(name) {
  language = name;
  try {
    localStorage.setItem(KEY, name);
  } catch {
    // not remembered then
  }
}

/** The text at *path* ("finish.stop"), with {0}, {1}... filled in; undefined if there is none. */
export function text(path, ...values) {
  const found = path.split(".").reduce((node, key) => node?.[key], TEXTS[language]);
  return typeof found === "string" ? found.replace(/\{(\d)\}/g, (_, index) => values[index]) : found;
}

/** *count* of something, in the right grammatical number. */
export const counted = (path, count) => text(`${path}.${count === 1 ? "one" : "other"}`, number(count, 0));

/** A number as the language writes it. */
export const number = (value, digits = 1) => new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(value);

/** A share of one as a percentage. */
export const percent = (share) => new Intl.NumberFormat(language, { style: "percent" }).format(share);

/** Milliseconds, as a person reads them. */
export const duration = (ms) => (ms < 1000 ? `${number(ms, 0)} ms` : `${number(ms / 1000)} s`);

/** Write the texts that *root*'s elements ask for: data-text, data-label and data-placeholder. */
export function translate(root) {
  for (const node of root.querySelectorAll("[data-text]")) node.textContent = text(node.dataset.text);
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = text(node.dataset.placeholder);
  for (const node of root.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", text(node.dataset.label));
    if (node.tagName === "BUTTON") node.title = text(node.dataset.label);
  }
}
