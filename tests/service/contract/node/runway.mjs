// Drives the official Node SDK against a running server and prints one JSON object a step.
//   node runway.mjs SDK_FOLDER BASE_URL API_KEY PICTURE
// The waiting of waitForTaskOutput (6 s a poll) is shortened by a faster setTimeout; nothing else is touched.
import { readFile } from "node:fs/promises";
import { createReadStream } from "node:fs";
import { pathToFileURL } from "node:url";
import path from "node:path";

const [sdk, baseURL, apiKey, picture] = process.argv.slice(2);
const realSetTimeout = globalThis.setTimeout;
globalThis.setTimeout = (f, ms, ...args) => realSetTimeout(f, ms > 2000 && ms < 10000 ? ms / 100 : ms, ...args);

const { default: RunwayML, TaskFailedError } = await import(pathToFileURL(path.join(sdk, "index.mjs")));
const client = new RunwayML({ apiKey, baseURL });
const say = (step, value) => console.log(JSON.stringify({ step, ...value }));
const failure = async (promise) => {
  try {
    await promise;
  } catch (e) {
    return { kind: e.constructor.name, status: e.status, body: e.error, details: e.taskDetails };
  }
  return { kind: "none" };
};

const made = { model: "gen4.5", promptText: "a red ball", duration: 2, ratio: "1280:720", seed: 7 };
const task = await client.textToVideo.create(made);
say("created", { id: task.id, estimatedCost: task.estimatedCost });
const done = await client.textToVideo.create(made).waitForTaskOutput();
say("done", { status: done.status, cost: done.cost, outputs: done.output.length });
const file = await fetch(done.output[0], { headers: { range: "bytes=4-7" } });
say("downloaded", { status: file.status, text: await file.text() });

const uploaded = await client.uploads.createEphemeral({ file: createReadStream(picture) });
say("uploaded", { uri: uploaded.uri });
const fromUpload = await client.imageToVideo
  .create({ model: "gen4_turbo", promptImage: uploaded.uri, ratio: "1280:720" })
  .waitForTaskOutput();
say("from upload", { status: fromUpload.status });
const uri = `data:image/png;base64,${(await readFile(picture)).toString("base64")}`;
const inline = await client.imageToVideo.create({
  model: "gen4_turbo",
  promptImage: [{ uri, position: "first" }],
  promptText: "it rolls",
  ratio: "1280:720",
});
say("inline", { id: inline.id });

const failing = client.textToVideo.create({ ...made, promptText: "fail please" }).waitForTaskOutput();
say("failed", await failure(failing));
const waiting = await client.textToVideo.create({ ...made, promptText: "wait please" });
await client.tasks.delete(waiting.id);
say("cancelled", await failure(client.tasks.retrieve(waiting.id)));
say("refused", await failure(client.textToVideo.create({ ...made, duration: 99 })));
say("unsupported", await failure(client.soundEffect.create({ model: "eleven_text_to_sound_v2", promptText: "a" })));
say("organization", await client.organization.retrieve());
say("end", { failedIsExported: typeof TaskFailedError });
