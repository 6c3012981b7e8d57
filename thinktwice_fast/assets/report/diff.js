const WORDS = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;
const LINES = /[^\n]*\n|[^\n]+$/g;
const MOST_CELLS = 4e6; // of the table of a comparison

/** What two texts have in common: [["same" | "gone" | "new", text], ...], by words, or by lines where both are long. */
function diff(before, after) {
  const words = [before.match(WORDS) ?? [], after.match(WORDS) ?? []];
  const small = words[0].length * words[1].length <= MOST_CELLS;
  return joined(small ? compared(...words) : compared(before.match(LINES) ?? [], after.match(LINES) ?? []));
}

/** Longest common subsequence. */
function compared(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) [endA, endB] = [endA - 1, endB - 1];
  const [n, m] = [endA - start, endB - start];
  const width = m + 1;
  const lengths = n * m <= MOST_CELLS ? new Uint32Array((n + 1) * width) : null;
  for (let i = n - 1; lengths && i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      const same = a[start + i] === b[start + j];
      lengths[i * width + j] = same
        ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const found = a.slice(0, start).map((text) => ["same", text]);
  let [i, j] = [0, 0];
  while (i < n || j < m) {
    if (lengths && i < n && j < m && a[start + i] === b[start + j]) {
      found.push(["same", a[start + i]]);
      i += 1;
      j += 1;
    } else if (i < n && (j === m || !lengths || lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) {
      found.push(["gone", a[start + i]]);
      i += 1;
    } else {
      found.push(["new", b[start + j]]);
      j += 1;
    }
  }
  return [...found, ...a.slice(endA).map((text) => ["same", text])];
}

function joined(parts) {
  const found = [];
  for (const [kind, text] of parts) {
    const last = found[found.length - 1];
    if (last && last[0] === kind) last[1] += text;
    else found.push([kind, text]);
  }
  return found;
}
