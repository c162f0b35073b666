-- What nginx has no directive for: which version answers a request, TorchServe's token, sending again what may be sent
-- again, and the shadow's copy. deploy/gateway/README.md explains why it is done here. Loaded by nginx.conf beside it.

local balancer = require "ngx.balancer"
local ffi = require "ffi"

ffi.cdef [[ unsigned char *SHA256(const unsigned char *d, size_t n, unsigned char *md); ]]

local gateway = {}

local NAME = "^[A-Za-z0-9_.-]+$"
local PREDICTIONS = "/grpc/torchserve/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
local PING = "/grpc/torchserve/org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping"
-- Copies of a model's requests under way at once. They share the candidate's queue, of 64 requests, with those that somebody
-- waits for. A candidate that is too slow for its shadow gets no more copies.
local MOST_SHADOWS = 8
-- Bytes of a message that is worth a look for garbage, which takes less than a millisecond.
local LARGE = 65536
-- Fields of one gRPC message: its inputs, and two names.
local MOST_FIELDS = 4096
local POLL_S = 0.05
-- Workers that one request may take with it. A copy takes one: that the candidate dies of it is what the copy is for.
local MOST_DEATHS = 2

local INVALID_ARGUMENT, PERMISSION_DENIED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 3, 7, 12, 13, 14

-- --- files that others write ---------------------------------------------------------------------------------------

local function contents(path)
    local file = io.open(path, "rb")
    if not file then
        return ""
    end
    local text = file:read("*a")
    file:close()
    return text or ""
end

-- Files are read for every request, some microseconds each: a change holds for the very next one, and nothing is reloaded.
local function parsed(path, parse)
    local text, result
    return function()
        local now = contents(path())
        if now ~= text then
            text, result = now, parse(now)
        end
        return result
    end
end

local function lines_of(text)
    local lines = {}
    for line in text:gmatch("[^\n]+") do
        local words = {}
        for word in line:gmatch("%S+") do
            words[#words + 1] = word
        end
        lines[#lines + 1] = words
    end
    return lines
end

local rollouts = parsed(function() return gateway.settings.folder .. "/routes" end, function(text)
    local found = {}
    for _, words in ipairs(lines_of(text)) do
        found[words[2]] = {
            baseline = words[3], candidate = words[4], thousandths = tonumber(words[5]), shadow = words[6] == "shadow",
        }
    end
    return found
end)

local torchserve = parsed(function() return gateway.settings.folder .. "/server" end, function(text)
    local found = { registered = {} }
    for _, words in ipairs(lines_of(text)) do
        if words[1] == "registered" then
            found.registered[words[2]] = true
            found.registered[words[2] .. " " .. words[3]] = true
        else
            found[words[1]] = words[2]
        end
    end
    return found
end)

-- TorchServe empties this file before it writes it anew: then there is no token for a moment.
local token = parsed(function() return gateway.settings.token_file end, function(text)
    return text:match('"inference"%s*:%s*{[^}]-"key"%s*:%s*"([^"]+)"')
end)

local secret = parsed(function() return gateway.settings.folder .. "/secret" end, function(text) return text end)

local keys = parsed(function() return gateway.settings.folder .. "/keys" end, function(text)
    local found = {}
    for key in text:gmatch("%x+") do
        found[key] = true
    end
    return found
end)

-- --- callers ---------------------------------------------------------------------------------------------------------

local function hex(bytes)
    return (bytes:gsub(".", function(byte) return string.format("%02x", byte:byte()) end))
end

local function sha256(text)
    local digest = ffi.new("unsigned char[32]")
    ffi.C.SHA256(text, #text, digest)
    return hex(ffi.string(digest, 32))
end

function gateway.authenticate()
    if not gateway.settings.keys then
        return
    end
    local key = (ngx.var.http_authorization or ""):match("^[Bb]earer +(%S+)$")
    -- Digests are compared, so that the time this takes says nothing about a key.
    if not key or not keys()[sha256(key)] then
        ngx.header["WWW-Authenticate"] = "Bearer"
        return ngx.exit(401)
    end
end

-- --- which version ---------------------------------------------------------------------------------------------------

-- The arm and the version of a request: `version` where the caller asked for one, else by the model's rollout. Without a
-- rollout there is no version: TorchServe takes its default one.
local function choose(model, version)
    local rollout = rollouts()[model]
    ngx.var.model = model
    local choice = { model = model, arm = "baseline", version = version }
    if version then
        choice.arm = "explicit"
    elseif rollout then
        local candidate = tonumber(ngx.var.thousandth) < rollout.thousandths
        choice.arm = candidate and "candidate" or "baseline"
        choice.version = candidate and rollout.candidate or rollout.baseline
        if rollout.shadow and not candidate then
            choice.shadow = rollout.candidate
        end
    end
    local sticky = ngx.var.http_x_skewless_sticky or ""
    choice.client = hex(ngx.hmac_sha1(secret(), sticky)):sub(1, 16)
    return choice
end

local function announce(choice)
    ngx.header["X-Skewless-Model"] = choice.model
    ngx.header["X-Skewless-Arm"] = choice.arm
    ngx.header["X-Skewless-Version"] = choice.version
    ngx.header["X-Skewless-Client"] = choice.client
    ngx.header["X-Skewless-Seconds"] = choice.seconds and string.format("%.4f", choice.seconds)
end

-- --- TorchServe ------------------------------------------------------------------------------------------------------

function gateway.balance()
    local host, port = ngx.var.address:match("^(.*):(%d+)$")
    -- An address that is not one ends this try, which the caller sees as TorchServe being away.
    assert(balancer.set_current_peer(host, tonumber(port)))
end

-- One try: the answer of a location that passes on to TorchServe, or nil while its address or token is not known.
local function try(protocol, path)
    local address, key = torchserve()[protocol], token()
    if not address or not key then
        return nil
    end
    local started = ngx.now()
    local answer = ngx.location.capture(path, {
        method = ngx.HTTP_POST,
        always_forward_body = true,
        vars = { address = address, token = key },
    })
    ngx.update_time()
    answer.seconds = ngx.now() - started
    answer.token = key
    return answer
end

-- Why TorchServe did not answer what it was asked, or nil when it did: "token" (refused: nothing was run), "away" (no
-- connection, or none any more), "unknown" (no such version), "died" (the worker, while it had this request).
local function trouble(protocol, answer)
    if answer == nil or answer.status == 502 or answer.truncated then
        return "away"
    end
    if protocol == "rest" then
        if answer.status == 400 and answer.body:find('"InvalidKeyException"', 1, true) then
            return "token"
        elseif answer.status == 404 and answer.body:find('"Model', 1, true) then
            return "unknown"
        elseif (answer.status == 500 or answer.status == 507) and answer.body:find('"Worker died."', 1, true) then
            return "died"
        end
        return nil
    end
    local status, message = tonumber(answer.header["grpc-status"]), answer.header["grpc-message"] or ""
    if status == PERMISSION_DENIED then
        return "token"
    elseif status == INTERNAL and message:find("NotFoundException", 1, true) then
        return "unknown"
    elseif status and message:find("Worker died.", 1, true) then
        return "died"
    end
end

-- The answer to a request, sent again where that can help and cannot hurt: a prediction keeps nothing, so the same bytes
-- get the same answer. What waits, waits for at most hold_s.
local function forward(protocol, path, choice, most_deaths)
    local deadline = ngx.now() + gateway.settings.hold_s
    local deaths = 0
    while true do
        local answer = try(protocol, path)
        local why = trouble(protocol, answer)
        local asked = choice.version and (choice.model .. " " .. choice.version) or choice.model
        if why == "died" then
            deaths = deaths + 1
        end
        local again = why == "token" or why == "away" or (why == "died" and deaths < most_deaths)
            -- A TorchServe that has been started anew does not have its versions back yet.
            or (why == "unknown" and torchserve().registered[asked])
        if not again or ngx.now() > deadline then
            return (why ~= "away" and why ~= "token") and answer or nil
        end
        -- A renewed token is in its file within a moment.
        if why == "away" or why == "unknown" or (why == "token" and token() == answer.token) then
            ngx.sleep(POLL_S)
        end
    end
end

-- Have a copy sent to the candidate, when the caller has the answer already. How it went is for the log alone.
local function copy(protocol, choice)
    if not choice.shadow then
        return
    end
    local shared, name = ngx.shared.gateway, "shadows of " .. choice.model
    if shared:incr(name, 1, 0) <= MOST_SHADOWS then
        pcall(ngx.location.capture, "/copy/" .. protocol, {
            method = ngx.HTTP_POST,
            always_forward_body = true,
            vars = { model = choice.model, version = choice.shadow, client = choice.client },
        })
    end
    shared:incr(name, -1)
end

-- --- REST ------------------------------------------------------------------------------------------------------------

local function send(status, body, content_type)
    ngx.status = status
    ngx.header["Content-Type"] = content_type or "application/json"
    ngx.header["Content-Length"] = #body
    ngx.print(body)
    -- The caller has its answer; what follows happens behind its back.
    ngx.eof()
end

local function away()
    ngx.header["Retry-After"] = 5
    return send(503, '{"code": 503, "message": "TorchServe does not answer; send the request again later"}\n')
end

function gateway.rest()
    ngx.req.read_body()
    local model, version = ngx.var.uri:match("^/predictions/([^/]+)/?([^/]*)$")
    local choice = choose(model, version ~= "" and version or nil)
    local path = "/torchserve/predictions/" .. model .. "/"
    local answer = forward("rest", path .. (choice.version or ""), choice, MOST_DEATHS)
    choice.seconds = answer and answer.seconds
    announce(choice)
    if answer then
        send(answer.status, answer.body, answer.header["Content-Type"])
    else
        away()
    end
    copy("rest", choice)
end

function gateway.ping_rest()
    local answer = try("rest", "/torchserve/ping")
    if trouble("rest", answer) == "token" then
        ngx.sleep(POLL_S)
        answer = try("rest", "/torchserve/ping")
    end
    if trouble("rest", answer) then
        return away()
    end
    send(answer.status, answer.body)
end

-- --- gRPC ------------------------------------------------------------------------------------------------------------

-- The number at `at` of a message in protobuf's encoding, and where the next thing begins; nil for a cut one.
local function varint(message, at)
    local value, factor = 0, 1
    for i = at, at + 9 do
        local byte = message:byte(i)
        if not byte then
            return nil
        end
        value = value + (byte % 128) * factor
        if byte < 128 then
            return value, i + 1
        end
        factor = factor * 128
    end
end

-- model_name and model_version of a call's frame: five bytes, and a PredictionsRequest; nil for what is no such frame.
local function names(frame)
    local length = 0
    for i = 2, 5 do
        length = length * 256 + (frame:byte(i) or 0)
    end
    if #frame < 5 or length ~= #frame - 5 then
        return nil
    end
    local at, found, left = 6, {}, MOST_FIELDS
    while at <= #frame do
        local tag, value
        tag, at = varint(frame, at)
        left = left - 1
        if not tag or left < 0 then
            return nil
        end
        local field, kind = math.floor(tag / 8), tag % 8
        if kind == 0 then
            value, at = varint(frame, at)
        elseif kind == 1 then
            at = at + 8
        elseif kind == 5 then
            at = at + 4
        elseif kind == 2 then
            local size, from = varint(frame, at)
            if not size or from + size - 1 > #frame then
                return nil
            end
            if field <= 2 then
                found[field] = frame:sub(from, from + size - 1)
            end
            at = from + size
        else
            return nil
        end
        if not at or at > #frame + 1 then
            return nil
        end
    end
    return found[1] or "", found[2] or ""
end

local function received()
    ngx.req.read_body()
    local file = ngx.req.get_body_file()
    return file and contents(file) or ngx.req.get_body_data() or ""
end

-- Have the call's message carry a version: in front of it, or behind it. Of a field that comes twice the later one holds, so in
-- front it leaves a version that the caller asked for, and behind it takes the place of any. The message is not rewritten.
local function put(version, frame, behind)
    local field = "\18" .. string.char(#version) .. version
    local n = #frame - 5 + #field
    local size = { 0, math.floor(n / 16777216) % 256, math.floor(n / 65536) % 256, math.floor(n / 256) % 256, n % 256 }
    -- nginx has it in a file if it is large: while an answer is waited for, it takes no memory.
    ngx.req.init_body()
    ngx.req.append_body(string.char(unpack(size)) .. (behind and "" or field))
    if #frame > 5 then
        ngx.req.append_body(frame:sub(6))
    end
    if behind then
        ngx.req.append_body(field)
    end
    ngx.req.finish_body()
end

-- Lua collects strings when it has twice as many as last time; of large ones, that is much.
local function collect(size)
    if size > LARGE then
        collectgarbage()
    end
end

local function send_grpc(status, message, body)
    ngx.header["X-Skewless-Grpc-Status"] = status
    ngx.header["X-Skewless-Grpc-Message"] = message
    return send(200, body or "", "application/grpc")
end

local function away_grpc()
    return send_grpc(UNAVAILABLE, "TorchServe does not answer; send the request again later")
end

local function send_answer(answer)
    local status = answer.header["grpc-status"]
    if not status and answer.status == 200 and #answer.body >= 5 then
        status = 0
    end
    send_grpc(status or UNAVAILABLE, answer.header["grpc-message"] or "", answer.body)
end

function gateway.grpc()
    local frame = received()
    local size = #frame
    if frame:byte(1) == 1 then
        return send_grpc(UNIMPLEMENTED, "the gateway reads no compressed messages; send them as they are")
    end
    local model, version = names(frame)
    if not model or not model:find(NAME) or (version ~= "" and not version:find(NAME)) or #version > 127 then
        return send_grpc(INVALID_ARGUMENT, "this is no PredictionsRequest with a model_name that a model can have")
    end
    local choice = choose(model, version ~= "" and version or nil)
    if version == "" and choice.version then
        put(choice.version, frame, false)
    end
    frame = nil
    collect(size)
    local answer = forward("grpc", PREDICTIONS, choice, MOST_DEATHS)
    choice.seconds = answer and answer.seconds
    announce(choice)
    if answer then
        send_answer(answer)
    else
        away_grpc()
    end
    copy("grpc", choice)
end

function gateway.ping_grpc()
    ngx.req.read_body()
    local answer = try("grpc", PING)
    if trouble("grpc", answer) == "token" then
        ngx.sleep(POLL_S)
        answer = try("grpc", PING)
    end
    if trouble("grpc", answer) then
        return away_grpc()
    end
    send_answer(answer)
end

-- --- the copy --------------------------------------------------------------------------------------------------------

function gateway.shadow()
    local version = ngx.var.http_x_skewless_version
    local choice = { model = ngx.var.http_x_skewless_model, version = version }
    local answer, status
    if ngx.var.uri == "/shadow/grpc" then
        local frame = received()
        local size = #frame
        put(version, frame, true)
        frame = nil
        collect(size)
        answer = forward("grpc", PREDICTIONS, choice, 1)
        status = answer and answer.status or 200
        local code = answer and answer.header["grpc-status"] or (answer and #answer.body >= 5 and 0) or UNAVAILABLE
        ngx.var.shadow_grpc_status = code
    else
        ngx.req.read_body()
        answer = forward("rest", "/torchserve/predictions/" .. choice.model .. "/" .. version, choice, 1)
        status = answer and answer.status or 503
    end
    ngx.var.shadow_s = answer and string.format("%.4f", answer.seconds) or "null"
    ngx.exit(status)
end

return gateway
