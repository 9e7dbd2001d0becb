// One request as JSON on stdin, its answer as JSON on stdout: what transformers.js makes of a released folder,
// offline. Run from the folder that package.json was installed in.
//
//   {task: "feature-extraction", folder, dtype, texts, pooling, normalize} -> {input_ids, sentence_embedding, pooled}
//   {task: "text-ranking", folder, dtype, pairs: [[query, document], …]}   -> {input_ids, logits}
//   {task: "text-generation", folder, dtype, texts, messages, prompt_ids, max_new_tokens}
//                                                               -> {input_ids, rendered, new_ids, text}
import path from "node:path";
import {
  AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Tensor, env, pipeline,
} from "@huggingface/transformers";

let given = "";
for await (const chunk of process.stdin) given += chunk;
const request = JSON.parse(given);

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = path.dirname(path.resolve(request.folder));
env.useFSCache = false;
const name = path.basename(path.resolve(request.folder));
const options = { dtype: request.dtype ?? "fp32", device: "cpu", session_options: { intraOpNumThreads: 1 } };
const numbers = (tensor) => tensor.tolist().map((row) => row.map(Number));
const ids = (tokenizer, text, more = {}) => numbers(tokenizer(text, more).input_ids)[0];

async function embed(tokenizer) {
  const model = await AutoModel.from_pretrained(name, options);
  const batch = tokenizer(request.texts, { padding: true, truncation: true });
  const found = await model(batch);
  const answer = { sentence_embedding: numbers(found.sentence_embedding) };
  if (request.pooling) {
    // the pipeline as its users write it: it reads last_hidden_state and pools by itself
    const extract = await pipeline("feature-extraction", name, options);
    const { pooling, normalize = false } = request;
    answer.pooled = numbers(await extract(request.texts, { pooling, normalize }));
  }
  return answer;
}

async function rank(tokenizer) {
  // Raw logits: the text-classification pipeline gives 1 for every text of a model with a single label.
  // transformers.js has no class for a Qwen3 classifier; AutoModel runs any graph that needs no cache.
  let model;
  try {
    model = await AutoModelForSequenceClassification.from_pretrained(name, options);
  } catch (error) {
    if (!/Unsupported model type/.test(String(error))) throw error;
    model = await AutoModel.from_pretrained(name, options);
  }
  const [queries, documents] = [0, 1].map((side) => request.pairs.map((pair) => pair[side]));
  const batch = tokenizer(queries, { text_pair: documents, padding: true, truncation: true });
  return { class: model.constructor.name, logits: numbers((await model(batch)).logits), batch_ids: numbers(batch.input_ids) };
}

async function generate(tokenizer) {
  const answer = {};
  if (request.messages) {
    const chat = { tokenize: false, add_generation_prompt: true };
    answer.rendered = tokenizer.apply_chat_template(request.messages, chat);
  }
  const prompt = request.prompt_ids ?? (answer.rendered && ids(tokenizer, answer.rendered, { add_special_tokens: false }));
  if (prompt) {
    const model = await AutoModelForCausalLM.from_pretrained(name, options);
    const tensor = (values) => new Tensor("int64", BigInt64Array.from(values.map(BigInt)), [1, values.length]);
    const output = await model.generate({
      input_ids: tensor(prompt),
      attention_mask: tensor(prompt.map(() => 1)),
      max_new_tokens: request.max_new_tokens ?? 16,
      do_sample: false,
    });
    answer.new_ids = numbers(output)[0].slice(prompt.length);
    answer.text = tokenizer.decode(answer.new_ids, { skip_special_tokens: true });
  }
  return answer;
}

const tasks = { "feature-extraction": embed, "text-ranking": rank, "text-generation": generate };
if (!(request.task in tasks)) throw new Error(`unknown task ${request.task}; known: ${Object.keys(tasks)}`);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const answer = await tasks[request.task](tokenizer);
if (request.texts) answer.input_ids = request.texts.map((text) => ids(tokenizer, text));
console.log(JSON.stringify(answer));
