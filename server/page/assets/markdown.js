// Convert Markdown to DOM nodes. Text becomes text nodes only, so nothing that a model writes is markup or script.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = new RegExp([
  "(?<ticks>`+)(?<code>.+?)\\k<ticks>(?!`)",
  "\\*\\*(?<strong>\\S(?:.*?\\S)?)\\*\\*",
  "\\*(?<emphasis>[^\\s*](?:[^*]*[^\\s*])?)\\*",
  "(?<![\\w])_(?<under>[^\\s_](?:[^_]*[^\\s_])?)_(?!\\w)",
  "~~(?<strike>.+?)~~",
  "!?\\[(?<label>[^\\]]*)\\]\\((?<target>[^\\s)]+)(?:\\s+\"[^\"]*\")?\\)",
  "(?<url>https?:\\/\\/[^\\s<>\"')\\]]*[^\\s<>\"')\\].,;:!?])",
].join("|"), "s");

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function link(target, label) {
  if (!/^(https?:|mailto:)/i.test(target)) return element("span", label);
  const node = element("a", label);
  node.href = target;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

function inline(text, parent) {
  for (;;) {
    const found = INLINE.exec(text);
    if (!found) break;
    parent.append(text.slice(0, found.index));
    const { code, strong, emphasis, under, strike, label, target, url } = found.groups;
    if (code !== undefined) parent.append(element("code", code.trim() || code));
    else if (strong !== undefined) parent.append(inline(strong, element("strong")));
    else if (emphasis !== undefined) parent.append(inline(emphasis, element("em")));
    else if (under !== undefined) parent.append(inline(under, element("em")));
    else if (strike !== undefined) parent.append(inline(strike, element("s")));
    else if (url !== undefined) parent.append(link(url, url));
    else parent.append(link(target, label || target));
    text = text.slice(found.index + found[0].length);
  }
  parent.append(text);
  return parent;
}

function codeBlock(lines, language) {
  const code = element("code", lines.join("\n"));
  if (language) code.dataset.language = language;
  return element("pre", code);
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function table(head, rows) {
  const row = (line, name) => element("tr", ...cells(line).map((cell) => inline(cell, element(name))));
  return element("table", element("thead", row(head, "th")), element("tbody", ...rows.map((line) => row(line, "td"))));
}

// Convert the list that begins in line `start`. Return its node and the next line. Deeper items become nested lists.
function list(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(first[2], 10);
  let index = start;
  while (index < lines.length) {
    const item = ITEM.exec(lines[index]);
    if (!item || item[1].length < indent || /\d/.test(item[2]) !== ordered) break;
    const body = [item[3]];
    index += 1;
    while (index < lines.length) {
      const isInside = /^\s/.test(lines[index]) && lines[index].search(/\S/) > indent;
      const isGap = !lines[index].trim() && /^\s/.test(lines[index + 1] ?? "") && lines[index + 1].search(/\S/) > indent;
      if (!isInside && !isGap) break;
      body.push(lines[index]);
      index += 1;
    }
    const rest = body.slice(1);
    const margin = Math.min(...rest.filter((line) => line.trim()).map((line) => line.search(/\S/)));
    const entry = inline(body[0], element("li"));
    if (rest.length) entry.append(...blocks(rest.map((line) => line.slice(margin)), depth + 1));
    node.append(entry);
    if (!lines[index]?.trim() && ITEM.test(lines[index + 1] ?? "")) index += 1;
  }
  return [node, index];
}

function startsBlock(lines, index) {
  const line = lines[index];
  return !line.trim() || FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || QUOTE.test(line)
    || RULE.test(line) || (line.includes("|") && TABLE_RULE.test(lines[index + 1] ?? ""));
}

function blocks(lines, depth) {
  const nodes = [];
  let index = 0;
  while (index < lines.length) {
    const line = lines[index];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) index += 1;
    else if (fence) {
      const body = [];
      for (index += 1; index < lines.length && !lines[index].trimStart().startsWith(fence[1]); index += 1) body.push(lines[index]);
      index += 1;
      nodes.push(codeBlock(body, fence[2]));
    } else if (heading) {
      nodes.push(inline(heading[2], element(`h${Math.min(6, heading[1].length + 2)}`)));
      index += 1;
    } else if (RULE.test(line)) {
      nodes.push(element("hr"));
      index += 1;
    } else if (QUOTE.test(line) && depth < 8) {
      const body = [];
      for (; index < lines.length && QUOTE.test(lines[index]); index += 1) body.push(lines[index].replace(QUOTE, ""));
      nodes.push(element("blockquote", ...blocks(body, depth + 1)));
    } else if (ITEM.test(line) && depth < 8) {
      const [node, next] = list(lines, index, depth);
      nodes.push(node);
      index = next;
    } else if (line.includes("|") && TABLE_RULE.test(lines[index + 1] ?? "")) {
      const rows = [];
      for (index += 2; index < lines.length && lines[index].includes("|"); index += 1) rows.push(lines[index]);
      nodes.push(table(line, rows));
    } else {
      const body = [line];
      for (index += 1; index < lines.length && !startsBlock(lines, index); index += 1) body.push(lines[index]);
      nodes.push(inline(body.join("\n"), element("p")));
    }
  }
  return nodes;
}

export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}
