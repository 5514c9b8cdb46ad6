/** The conversation outlives a reload in this tab's sessionStorage: {turns: [{question, state}]}. */

const KEY = "capibara.conversation";

/** Keep *turns*; when there is no room the oldest ones are forgotten. */
export function save(turns) {
  for (let first = 0; first <= turns.length; first++) {
    try {
      sessionStorage.setItem(KEY, JSON.stringify({ turns: turns.slice(first).map(kept) }));
      return;
    } catch (error) {
      if (error.name !== "QuotaExceededError") return; // storage is forbidden: the page works without it
    }
  }
}

/** What was kept, or nothing. */
export function load() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY))?.turns ?? [];
  } catch {
    return []; // forbidden, or written by another version of this page
  }
}

const kept = ({ question, state }) => ({ question, state });
